"""Timer ids by counting, clocks of threads."""

import attrs
from hypothesis import given
from hypothesis import strategies as st

from ckpt.kernel.arch import NR
from ckpt.resources.timers import SIGEV_THREAD_ID, PosixTimerRecord, clock_of, plan_creation

TIMER = PosixTimerRecord(
    id=0, clock=1, notify=0, signal=14, value=0, thread=0, interval_ns=0, left_ns=0
)


class CountingKernel:
    """What timer_create does where no id can be asked for."""

    def __init__(self):
        self.next_id = 0
        self.timers = {}

    def run(self, asked, what):
        if asked.nr is NR.timer_create:
            self.timers[self.next_id] = what
            self.next_id += 1
        else:
            assert asked.nr is NR.timer_delete
            del self.timers[asked.args[0]]


@given(st.sets(st.integers(0, 200), max_size=20))
def test_counting_leaves_the_wanted_ids_and_no_others(ids):
    wanted = [attrs.evolve(TIMER, id=number, value=number) for number in sorted(ids)]
    kernel = CountingKernel()
    for step in plan_creation(wanted):
        for asked in step.calls():
            kernel.run(asked, step.timer)
    assert kernel.timers == {timer.id: timer for timer in wanted}


def test_the_processor_clock_of_a_thread_is_named_by_its_tid():
    timer = attrs.evolve(TIMER, clock=-2, notify=SIGEV_THREAD_ID, thread=1234)
    clock = clock_of(timer)
    assert ~(clock >> 3) == 1234
    assert clock & 0b111 == 0b110


def test_other_clocks_stay_what_they_are():
    assert clock_of(attrs.evolve(TIMER, thread=1234)) == 1
    assert clock_of(attrs.evolve(TIMER, clock=-2)) == -2
    assert clock_of(attrs.evolve(TIMER, clock=-6, thread=1234)) == -6
