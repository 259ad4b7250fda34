"""Children of ours to be frozen, and the disturbance that a dump is to them."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.procfs.status import read_status
from ckpt.process.arena import arena
from ckpt.process.freezer import Frozen, freeze
from ckpt.process.remote import call
from ckpt.units import Pid

_CALLS = [call(NR.getpid), call(NR.gettid), call(NR.getppid)]


def disturb(pid: int) -> Frozen:
    """Freeze, run a batch on every thread, thaw."""
    with (
        freeze(Pid(pid), ptrace.Option.NONE) as frozen,
        arena(Pid(pid), frozen.tgid, frozen.leader) as lent,
    ):
        for task in frozen.tasks.values():
            replies = lent.run(task, _CALLS)
            assert [reply.value for reply in replies[:2]] == [pid, task.tid]
    return frozen


@contextlib.contextmanager
def child(prepare: Callable[[], None], then: Callable[[], None] = signal.pause) -> Iterator[int]:
    """Fork a child that has run `prepare` and now does `then` over and over; killed at the end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            prepare()
            os.write(writer, b"x")
            while True:
                then()
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"x", "the child could not prepare itself"
        yield pid
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def state_of(pid: int) -> str:
    """Return the letter of a process's state."""
    return read_status(Pid(pid)).state


def await_state(pid: int, letter: str) -> None:
    """Return once the process is in that state: a thread that is let go has yet to stop again."""
    give_up_s = time.monotonic() + 20
    while state_of(pid) != letter:
        assert time.monotonic() < give_up_s, f"{pid} is in state {state_of(pid)}, not {letter}"
        os.sched_yield()


def status_lines(pid: int, *names: str) -> list[str]:
    """Return lines of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [line for line in lines if line.partition(":")[0] in names]
