"""A thread in a blocking system call goes on after a freeze as if nothing had been."""

import select

import pytest

from ckpt.kernel.arch import NR
from integration.freezer.targets import disturb
from integration.workloads.catalog import BLOCKING_ENDLESS, BLOCKING_RELEASED, BLOCKING_TIMED
from integration.workloads.driver import Program

TIMES = 20
SECONDS = 1.0
# A timeout in milliseconds is rounded up with every stop; a busy machine wakes threads late.
LATE_NS = TIMES * 1_000_000 + 500_000_000


@pytest.mark.parametrize("case", [*BLOCKING_ENDLESS, *BLOCKING_RELEASED])
def test_a_call_goes_on_until_it_is_released(case, tmp_path):
    with Program("blocking", case, cwd=tmp_path) as program:
        for _ in range(TIMES):
            disturb(program.pid)
            assert program.ask("peek") == "blocked"
        assert program.ask("check") == "ok"
        assert program.quit() == 0


@pytest.mark.parametrize("case", BLOCKING_TIMED)
def test_a_timeout_runs_on(case, tmp_path):
    with Program("blocking", case, str(SECONDS), cwd=tmp_path) as program:
        for _ in range(TIMES):
            disturb(program.pid)
        assert program.ask("check") == "ok"
        assert 0 <= int(program.ask("late").split()[1]) < LATE_NS
        assert program.quit() == 0


@pytest.mark.parametrize("case", ["epoll_timed", "sigtimedwait", "poll_timed", "select_timed"])
def test_stops_without_end_do_not_starve_a_timeout(case, tmp_path):
    with Program("blocking", case, str(SECONDS), cwd=tmp_path) as program:
        program.tell("step")
        n_stops = 0
        while not select.select([program.process.stdout], [], [], 0)[0]:
            disturb(program.pid)
            n_stops += 1
        assert program.line() == "stepped"
        assert n_stops > TIMES
        # Each may round a timeout in milliseconds up.
        assert int(program.ask("late").split()[1]) < n_stops * 2_000_000 + LATE_NS
        assert program.ask("check") == "ok"


@pytest.mark.parametrize(
    ("case", "number"),
    [
        ("nanosleep_long", NR.nanosleep),
        ("clock_nanosleep", NR.clock_nanosleep),
        ("poll_timed", NR.poll),
        ("futex_timed", NR.futex),
    ],
)
def test_a_continued_call_is_still_known_by_its_number(case, number, tmp_path):
    with Program("blocking", case, "3600", cwd=tmp_path) as program:
        for _ in range(3):
            frozen = disturb(program.pid)
            assert program.ask("peek") == "blocked"
        assert [sleep.call for sleep in frozen.sleeps.values()] == [number]


def test_the_time_slept_is_seen(tmp_path):
    with Program("blocking", "nanosleep_long", cwd=tmp_path) as program:
        with Program("blocking", "nanosleep", "0.5", cwd=tmp_path) as clock:
            assert clock.ask("step") == "stepped"  # at least half a second has passed
        (sleep,) = disturb(program.pid).sleeps.values()
        assert sleep.slept_ns > 400_000_000


def test_an_interrupted_call_still_ends_with_eintr(tmp_path):
    with Program("blocking", "epoll", cwd=tmp_path) as program:
        disturb(program.pid)
        assert program.ask("corrupt") == "corrupted"
        assert program.ask("peek") == "returned -1 4"
