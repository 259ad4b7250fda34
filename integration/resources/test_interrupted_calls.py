"""A call with a timeout that was interrupted by a dump waits, once restored, for the time left."""

import os
import signal

import pytest

from integration.freezer.targets import await_state
from integration.harness import Restored, become_subreaper, dump
from integration.workloads.catalog import BLOCKING_ENDLESS, BLOCKING_NOT_ALONE, BLOCKING_RELEASED
from integration.workloads.driver import Program

become_subreaper()

SECONDS = 2.0
HALF_NS = int(SECONDS / 2 * 1e9)
TIMED = [
    *["nanosleep", "clock_nanosleep", "clock_nanosleep_abs", "poll_timed", "select_timed"],
    *["epoll_timed", "futex_timed", "futex_abs", "sigtimedwait"],
]
# After the second dump the kernel has continued the call once; of these only the last stretch is
# known, and a call of the C library tells its number.
CONTINUED_AND_FORGOTTEN = {"poll_timed", "futex_timed"}


@pytest.mark.parametrize(
    "case", sorted({*BLOCKING_ENDLESS, *BLOCKING_RELEASED} - set(BLOCKING_NOT_ALONE))
)
def test_a_call_without_timeout_is_in_progress_again(case, tmp_path):
    image = tmp_path / "image"
    with Program("blocking", case, cwd=tmp_path) as program:
        for _ in range(2):
            dump(program.pid, image)
        assert program.ask("peek") == "blocked"
    with Restored(image) as program:
        assert program.ask("peek") == "blocked"
        assert program.ask("check") == "ok"
        assert program.quit() == 0


@pytest.mark.parametrize("case", TIMED)
def test_the_time_that_was_left_is_waited_for(case, tmp_path):
    image = tmp_path / "image"
    with (
        Program("blocking", case, str(SECONDS), cwd=tmp_path) as program,
        Program("blocking", "nanosleep", str(SECONDS / 2), cwd=tmp_path) as clock,
    ):
        assert clock.ask("step") == "stepped"  # half of the time has passed
        dump(program.pid, image)
    with Restored(image) as program:
        # The process's own clock stood still while it was away: never early, little late.
        assert program.ask("step") == "stepped"
        late_ns = int(program.ask("late").split()[1])
        assert 0 <= late_ns < HALF_NS * 3 // 4


@pytest.mark.parametrize("case", TIMED)
def test_after_several_dumps_it_is_never_early_and_at_most_once_more(case, tmp_path):
    image = tmp_path / "image"
    with Program("blocking", case, str(SECONDS), cwd=tmp_path) as program:
        for _ in range(3):
            dump(program.pid, image)
    with Restored(image) as program:
        assert program.ask("step") == "stepped"
        limit_ns = HALF_NS * (3 if case in CONTINUED_AND_FORGOTTEN else 1)
        assert 0 <= int(program.ask("late").split()[1]) < limit_ns


def test_a_handler_that_was_due_ends_the_call_in_the_restored_process(tmp_path):
    image = tmp_path / "image"
    with Program("blocking", "epoll", cwd=tmp_path) as program:
        dump(program.pid, image)
    with Restored(image) as program:
        assert program.ask("corrupt") == "corrupted"
        assert program.ask("peek") == "returned -1 4"


def test_a_stopped_process_is_restored_stopped(tmp_path):
    image = tmp_path / "image"
    with Program("blocking", "epoll_timed", "1", cwd=tmp_path) as program:
        os.kill(program.pid, signal.SIGSTOP)
        os.waitpid(program.pid, os.WUNTRACED)
        dump(program.pid, image)
    with Restored(image, "--detach") as program:
        await_state(program.pid, "T")
        os.kill(program.pid, signal.SIGCONT)
        # It was the stop that ended the call, as it does without us (signal(7)).
        assert program.ask("peek") == "returned -1 4"
