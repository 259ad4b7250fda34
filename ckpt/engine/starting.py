"""Starting a command that does not run before somebody has noted who it is.

    we                                      the child
    bear                                    is made, leads a session, waits at a pipe
    (its pid and start time are noted)
    go                                      exec; or why not, by another pipe

If we end before `go`, the pipe ends, and so does the child: no command ever runs that the next
start would not find. Neighbour: `supervising`.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from typing import NoReturn

import attrs

from ckpt.errors import UsageError
from ckpt.units import Pid

_EXIT_NOT_STARTED = 127
_PYTHON_IGNORES = (signal.SIGPIPE, signal.SIGXFSZ)
"""What an interpreter ignores for itself, and a command must not inherit so."""


@attrs.frozen
class Newborn:
    """A child that waits to become a command."""

    pid: Pid
    command: tuple[str, ...]
    _go: int
    _failure: int

    def go(self) -> None:
        """Let it become its command.

        Raises:
            UsageError: there is no such program, or it cannot be run.
        """
        # If somebody has killed it meanwhile, its status will tell.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"x")
        failure = os.read(self._failure, 16)
        if failure:
            os.waitpid(self.pid, 0)
            reason = os.strerror(int(failure))
            raise UsageError(f"cannot start {self.command[0]!r}: {reason}")


@contextlib.contextmanager
def bear(command: Sequence[str]) -> Iterator[Newborn]:
    """Make a child for a command, in a session of its own; it ends unless it was let go.

    Nothing that a terminal sends to us reaches it then. Signals that we ignore, it ignores too.
    """
    waits, go = os.pipe()
    failure, fails = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            os.close(go)
            _become(command, waits, fails)
        os.close(fails)
        fails = -1
        yield Newborn(Pid(pid), tuple(command), go, failure)
    finally:
        for fd in (waits, go, failure, fails):
            if fd >= 0:
                os.close(fd)


def _become(command: Sequence[str], waits: int, fails: int) -> NoReturn:
    """In the child: wait, then run the command."""
    try:
        signal.set_wakeup_fd(-1)
        os.setsid()
        if os.read(waits, 1):
            for number in _PYTHON_IGNORES:
                signal.signal(number, signal.SIG_DFL)
            os.execvp(command[0], list(command))
    except OSError as error:
        os.write(fails, str(error.errno).encode())
    finally:
        # Nothing of the parent's own ending may run here too.
        os._exit(_EXIT_NOT_STARTED)
