"""Dump and restore through the Python API, in processes that have everything imported already.

`integration.harness` runs the commands, as a user would. On an emulated processor a command takes
seconds to start, and these tests take hundreds of checkpoints: they dump in the test's own process
and restore in a fork of it, which waits for the restored process as the command does.
"""

import contextlib
import os
import signal
import traceback
from pathlib import Path
from typing import NoReturn, Self

import ckpt
from ckpt.engine.convergence import DEFAULT_BUDGET_MS
from integration.workloads.driver import Dialogue

AS_MANY_ROUNDS_AS_HELP = 0.0
"""As `max_freeze_ms`: memory is copied while the process runs until that leaves no less."""


def dump(
    pid: int, image: Path, tracker: str, max_freeze_ms: float = DEFAULT_BUDGET_MS
) -> ckpt.DumpResult:
    """Take a checkpoint: a delta wherever that is right."""
    options = ckpt.DumpOptions(incremental=True, tracker=tracker, max_freeze_ms=max_freeze_ms)
    return ckpt.dump(pid, image, options)


def expect_ok(work: Dialogue, where: str = "") -> None:
    """Let the program judge itself; fails with its reason."""
    answer = work.ask("check")
    assert answer == "ok", f"{where} {answer}"


class Restored(Dialogue):
    """A process of an image, brought back with new pipes; killed at the end of a `with`."""

    def __init__(self, image: Path, at: int | None = None) -> None:
        stdin, self._commands_fd = os.pipe()
        self._answers_fd, stdout = os.pipe()
        told, tell = os.pipe()
        self._waiter = os.fork()
        if self._waiter == 0:
            for fd in (self._commands_fd, self._answers_fd, told):
                os.close(fd)
            _restore_and_wait(image, at, (stdin, stdout), tell)
        for fd in (stdin, stdout, tell):
            os.close(fd)
        super().__init__(self._commands_fd, self._answers_fd)
        with open(told) as file:
            said = file.read()
        if not said.isdecimal():
            self._close()
            raise AssertionError(f"restore of generation {at} failed:\n{said}")
        self.pid = int(said)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._close()

    def _close(self) -> None:
        os.waitpid(self._waiter, 0)
        os.close(self._commands_fd)
        os.close(self._answers_fd)


def _restore_and_wait(image: Path, at: int | None, streams: tuple[int, int], tell: int) -> NoReturn:
    """Be the restorer: tell the pid, or what went wrong, and end when the process has ended."""
    try:
        os.dup2(streams[0], 0)
        os.dup2(streams[1], 1)
        os.dup2(os.open(os.devnull, os.O_RDWR), 2)
        pid = ckpt.restore(image, at=at).pid
        os.write(tell, b"%d" % pid)
        os.close(tell)
        ckpt.wait_for_end(pid)
    except BaseException:
        os.write(tell, traceback.format_exc().encode())
    finally:
        # Whatever else the fork has of the test is not its to end.
        os._exit(0)
