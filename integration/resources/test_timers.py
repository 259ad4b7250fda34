"""Timer ids with gaps, on kernels that can be asked for an id and on those that only count."""

import attrs
import pytest

from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import PR_TIMER_CREATE_RESTORE_IDS_GET, Prctl
from ckpt.kernel.procfs.task import read_timers
from ckpt.process.remote import In, Out, call
from ckpt.resources.timers import (
    SIGEV_NONE,
    SIGEV_SIGNAL,
    SIGEV_THREAD_ID,
    TIMERS,
    IntervalTimerRecord,
    PosixTimerRecord,
    TimersRecord,
)
from integration.resources.embryos import FEATURES, embryo, recapture, restore

HOUR_NS = 3600 * 10**9
SECOND_NS = 10**9

MONOTONIC = PosixTimerRecord(
    id=3,
    clock=1,
    notify=SIGEV_SIGNAL,
    signal=34,
    value=0x1122_3344_5566_7788,
    thread=0,
    interval_ns=7,
    left_ns=HOUR_NS,
)
DISARMED = attrs.evolve(MONOTONIC, id=0, notify=SIGEV_NONE, signal=0, interval_ns=0, left_ns=0)
PROCESSOR_TIME = attrs.evolve(MONOTONIC, id=1500, clock=-6, interval_ns=SECOND_NS)


def record_of(*timers):
    return TimersRecord(
        interval_timers=(
            IntervalTimerRecord(0, 2 * SECOND_NS, HOUR_NS),
            IntervalTimerRecord(2, 0, 2 * HOUR_NS),
        ),
        posix_timers=timers,
        monotonic_ns=2**62,  # the clock of the embryo has not got there: nothing has passed
    )


def without_left(record):
    return attrs.evolve(
        record,
        interval_timers=tuple(attrs.evolve(t, left_ns=0) for t in record.interval_timers),
        posix_timers=tuple(attrs.evolve(t, left_ns=0) for t in record.posix_timers),
        monotonic_ns=0,
    )


def lost_ns(before, after):
    pairs = zip(
        (*before.interval_timers, *before.posix_timers),
        (*after.interval_timers, *after.posix_timers),
        strict=True,
    )
    return [was.left_ns - now.left_ns for was, now in pairs]


WAYS = [
    pytest.param(
        True,
        id="asked for",
        marks=pytest.mark.skipif(
            not FEATURES.timer_restore_ids, reason="this kernel cannot be asked for a timer id"
        ),
    ),
    pytest.param(False, id="counted"),
]


@pytest.mark.parametrize("asked_for", WAYS)
def test_timers_come_back_with_their_ids(asked_for):
    features = attrs.evolve(FEATURES, timer_restore_ids=asked_for)
    record = record_of(DISARMED, MONOTONIC, PROCESSOR_TIME)
    with embryo() as planted:
        assert restore(TIMERS, record, planted, features) == []
        again = recapture(TIMERS, planted)
        assert without_left(again) == without_left(record)
        # The kernel counts processor time in ticks, and rounds what is left of it up.
        assert all(-SECOND_NS < lost < 10 * SECOND_NS for lost in lost_ns(record, again))


@pytest.mark.skipif(not FEATURES.timer_restore_ids, reason="this kernel has no such switch")
def test_the_process_chooses_no_ids_afterwards():
    with embryo() as planted:
        restore(TIMERS, record_of(MONOTONIC), planted)
        (switch,) = planted.run(
            [
                call(
                    NR.prctl,
                    Prctl.TIMER_CREATE_RESTORE_IDS,
                    PR_TIMER_CREATE_RESTORE_IDS_GET,
                    *(0, 0, 0),
                )
            ]
        )
        assert switch.value == 0


def test_what_has_passed_on_the_own_clock_is_subtracted():
    with embryo() as planted:
        now = int.from_bytes(
            planted.run([call(NR.clock_gettime, 1, Out(16))])[0].outs[0][:8], "little"
        )
        record = attrs.evolve(record_of(MONOTONIC), monotonic_ns=(now - 100) * SECOND_NS)
        restore(TIMERS, record, planted)
        lost = lost_ns(record, recapture(TIMERS, planted))
        assert 100 * SECOND_NS <= lost[0] < 120 * SECOND_NS  # ITIMER_REAL
        assert lost[1] < SECOND_NS  # ITIMER_PROF
        assert 100 * SECOND_NS <= lost[2] < 120 * SECOND_NS


def test_a_timer_whose_thread_had_ended_is_silent():
    orphan = attrs.evolve(MONOTONIC, notify=SIGEV_SIGNAL | SIGEV_THREAD_ID, thread=0)
    with embryo() as planted:
        restore(TIMERS, record_of(orphan), planted)
        (timer,) = read_timers(planted.pid)
        assert (timer.timer_id, timer.notify) == (3, "none")


def test_the_processor_time_of_a_named_thread_is_counted():
    with embryo() as planted:
        mine = attrs.evolve(
            PROCESSOR_TIME, clock=-2, notify=SIGEV_THREAD_ID, thread=int(planted.pid)
        )
        restore(TIMERS, record_of(mine), planted)
        (timer,) = read_timers(planted.pid)
        assert timer.target == planted.pid
        assert planted.run([call(NR.timer_gettime, 1500, Out(32))])[0].ok


def test_an_armed_timer_rings():
    soon = attrs.evolve(MONOTONIC, left_ns=1, interval_ns=0)
    with embryo() as planted:
        restore(TIMERS, record_of(soon), planted)
        wanted = In((1 << 33).to_bytes(8, "little"))
        ring = call(NR.rt_sigtimedwait, wanted, Out(128), In(bytes([20]) + bytes(15)), 8)
        (reply,) = planted.run([ring])
        assert reply.value == 34
        assert reply.outs[0][24:32] == MONOTONIC.value.to_bytes(8, "little")
