"""Faults at numbered points of a migration, for those who prove what becomes of the tree then.

    CKPT_FAULT=POINT[#N]=ACTION      at the N-th time (1 if not given) that POINT is reached

A point is `send:M`, `sent:M`, `received:M` (M: a message, as in `messages`), `message` (each of
those), or a name that is given to `reach`. Read once, when ckpt starts; nothing happens without it.
There is one fault at most: who outlives another process, to tell what became of it, calls `forget`.

    cut          the connection of that message ends, both ways
    kill         SIGKILL of this process
    interrupt    SIGINT, as by Ctrl-C
    terminate    SIGTERM
    wait:FIFO    our pid is written there; we go on when something is written to us
    starve       MemoryError, as where no more is to be had
    note:FILE    its name is written there, and from then on that of each such point
"""

import contextlib
import os
import signal
import socket
from collections.abc import Mapping

import attrs

VARIABLE = "CKPT_FAULT"
ANY_MESSAGE = "message"
_SIGNALS = {
    "kill": signal.SIGKILL,
    "interrupt": signal.SIGINT,
    "terminate": signal.SIGTERM,
}


@attrs.define
class Fault:
    """What happens, and when."""

    point: str
    left: int
    """How often the point is still to be reached until then."""
    action: str

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Fault | None":
        """Return the one that the environment names."""
        point, _, action = environment.get(VARIABLE, "").partition("=")
        if not action:
            return None
        point, _, nth = point.partition("#")
        return cls(point, int(nth or 1), action)

    def reach(self, point: str, connection: int | None) -> None:
        """Let it happen, if this is its point."""
        if point != self.point and (self.point != ANY_MESSAGE or connection is None):
            return
        self.left -= 1
        if self.left <= 0 and self.action.startswith("note:"):
            _note(self.action.removeprefix("note:"), point)
        elif self.left == 0:
            self._happen(connection)

    def _happen(self, connection: int | None) -> None:
        if self.action == "cut" and connection is not None:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection)) as same:
                same.shutdown(socket.SHUT_RDWR)
        elif self.action.startswith("wait:"):
            _wait(self.action.removeprefix("wait:"))
        elif self.action == "starve":
            raise MemoryError
        elif self.action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self.action])


def _note(path: str, point: str) -> None:
    with open(path, "a") as notes:
        notes.write(f"{point}\n")


def _wait(fifo: str) -> None:
    with open(fifo, "w") as told:
        told.write(f"{os.getpid()}\n")
    with open(fifo) as heard:
        heard.read(1)


_planned = [fault] if (fault := Fault.read(os.environ)) else []


def reach(point: str, connection: int | None = None) -> None:
    """Say that we are at a point; `connection` is the descriptor of the one it is about."""
    for one in _planned:
        one.reach(point, connection)


def forget() -> None:
    """Let nothing happen in this process from here on."""
    _planned.clear()
