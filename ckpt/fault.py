"""Faults at named points, for those who prove what becomes of target, images and tree then.

    CKPT_FAULT=POINT[#N]=ACTION      at the N-th time (1 if not given) that POINT is reached
    CKPT_FAULT=without-FEATURE       as on a kernel that does not have FEATURE, all the time

A point is one of `POINTS`; or `send:M`, `sent:M`, `received:M` (M: a message of a migration), or
`message` (each of those); or `any`. Features are those of `FEATURES`. Read once, when this is
imported; nothing happens without it. There is one fault at most: who outlives another process, to
tell what became of it, calls `forget`.

    cut          the connection of that message ends, both ways
    fail         an error, as where the kernel has refused the step
    full         the same, as where no room is left
    kill         SIGKILL of this process
    interrupt    SIGINT, as by Ctrl-C
    terminate    SIGTERM
    wait:FIFO    our pid is written there; we go on when something is written to us
    starve       MemoryError, as where no more is to be had
    note:FILE    its name is written there, and from then on that of each such point

Points are between the steps of whole trees, never in what is done for each page. Beside the layers
that reach them (`engine`, `process`, `image`, `migrate`) this knows none of them.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Collection, Mapping

import attrs

from ckpt.errors import HostFull, NotPermitted, UsageError

VARIABLE = "CKPT_FAULT"
ANY = "any"
ANY_MESSAGE = "message"
_MESSAGE_PREFIXES = ("send:", "sent:", "received:")
_WITHOUT = "without-"

DUMP: Mapping[str, str] = {
    "dump-looked": "all that is known from outside was looked at, nothing was stopped",
    "dump-locked": "the chain is ours",
    "dump-decided": "what the last dump has left was taken over",
    "dump-begun": "the generation has a temporary directory",
    "dump-watching": "the tree stands still, to have its memory watched while it runs",
    "dump-watched": "it runs again, and is watched",
    "dump-asked": "a tracker has told what was written, and counts from here",
    "dump-round": "a round of copying has ended; the tree runs",
    "dump-frozen": "all threads stand still",
    "dump-read": "all that can be was read from outside",
    "dump-arenas": "there is an arena in each process",
    "dump-called": "all resources are captured",
    "dump-attached": "what tracks the next writes was made in each process",
    "dump-cloned": "a process has a twin",
    "dump-captured": "the arenas are gone",
    "dump-armed": "the trackers count from here on; nothing of the rest is copied",
    "dump-copied": "what the twins do not have is copied",
    "dump-thawed": "all runs again",
    "dump-stored": "all pages were handed on, the twins are gone",
    "dump-settled": "the records are complete",
    "dump-committed": "the generation is there",
    "dump-doomed": "the tree, which is to be killed, ends with us; it stands still",
    "dump-killed": "the tree that was to be killed is",
    "dump-advanced": "the epoch says so",
}
"""In the order in which a dump comes by."""

IMAGE: Mapping[str, str] = {
    "image-made": "the temporary directory of a generation is there, and empty",
    "image-pages": "all its pages are on the disk",
    "image-manifest": "its manifest is on the disk, under the temporary name",
    "image-renamed": "it has its name, which a power cut might still take away",
}
"""Whoever writes it."""

EPOCH: Mapping[str, str] = {
    "epoch-noted": "what holds a tracker is named in /run/ckpt; that it counts is not said yet",
}
"""After a dump, and after a restore."""

RESTORE: Mapping[str, str] = {
    "restore-verified": "all that is used of the image was checked",
    "restore-arrived": "the network of the tree is held",
    "restore-checked": "this host can have the tree",
    "restore-contents": "what has no name is there, with its content",
    "restore-opened": "its files are open, in us",
    "restore-planted": "there is the root, empty",
    "restore-mapped": "processes have their memory",
    "restore-born": "all processes are there",
    "restore-finished": "their memory is as it was, protection and all",
    "restore-files": "they have their files",
    "restore-processes": "and all else that a process has",
    "restore-threads": "all threads are there",
    "restore-states": "and have what each has of its own",
    "restore-late": "timers run, signals are queued",
    "restore-credentials": "everybody is who he was",
    "restore-seen": "others can see it: connections and names are back",
    "restore-attached": "what tracks the next writes was made in each process",
    "restore-bare": "the arenas are gone",
    "restore-armed": "the trackers count from here on; no epoch says so",
    "restore-advanced": "the epochs say so",
    "restore-announced": "who waits for the tree knows its number",
    "restore-put-back": "each thread has its registers; all end with us",
    "restore-released": "nobody ends with us any more",
    "restore-let-go": "all runs",
}
"""In the order in which a restore comes by."""

MIGRATE: Mapping[str, str] = {
    "built": "the destination has the whole tree",
    "finished": "and others there can see it",
    "let-go": "and it runs there",
    "doomed": "the tree of the source ends with its ckpt",
    "departing": "the tree stands still for the last time",
    "departed": "its addresses have left the source",
}

POINTS: Mapping[str, str] = {**DUMP, **IMAGE, **EPOCH, **RESTORE, **MIGRATE}
"""Each with what is true when it is reached."""

FEATURES: Mapping[str, str] = {
    "process-vm": "process_vm_readv(2) and process_vm_writev(2)",
    "pagemap-scan": "PAGEMAP_SCAN",
    "userfaultfd": "userfaultfd(2)",
    "pidfd-getfd": "pidfd_getfd(2)",
    "kcmp": "kcmp(2)",
    "clone3": "clone3(2)",
    "mseal": "mseal(2)",
    "timer-ids": "PR_TIMER_CREATE_RESTORE_IDS",
    "twin": "a clone of the target, made in its name",
    "way-back": "instructions in the target that lead back from a single call of ours",
}
"""What a kernel may lack, or a target. Calls and requests get a number that no kernel knows: so it
is the kernel that refuses them, to us, in bursts, and to a target in whose name they are made."""
_UNKNOWN = 0x1000
"""Added to the number of a system call, of a prctl, or of an ioctl (there it is another type)."""

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
        """Return the one that the environment names.

        Raises:
            UsageError: there is no such point, feature, or action.
        """
        text = environment.get(VARIABLE, "")
        if not text:
            return None
        if text.startswith(_WITHOUT):
            _require("feature", text.removeprefix(_WITHOUT), FEATURES)
            return cls(text, 0, "")
        point, _, action = text.partition("=")
        point, _, nth = point.partition("#")
        if not point.startswith(_MESSAGE_PREFIXES):
            _require("point", point, {ANY, ANY_MESSAGE, *POINTS})
        _require("action", action.partition(":")[0], _ACTIONS)
        if not (nth or "1").isdecimal():
            raise UsageError(f"{VARIABLE}: {nth!r} is no number")
        return cls(point, int(nth or 1), action)

    def reach(self, point: str, connection: int | None) -> None:
        """Let it happen, if this is its point."""
        if self.point not in (point, ANY) and (self.point != ANY_MESSAGE or connection is None):
            return
        self.left -= 1
        if self.left <= 0 and self.action.startswith("note:"):
            _note(self.action.removeprefix("note:"), point)
        elif self.left == 0:
            self._happen(point, connection)

    def _happen(self, point: str, connection: int | None) -> None:
        if self.action == "cut" and connection is not None:
            _cut(connection)
        elif self.action.startswith("wait:"):
            _wait(self.action.removeprefix("wait:"))
        elif self.action in _ERRORS:
            raise _ERRORS[self.action](point)
        elif self.action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self.action])


_ERRORS: Mapping[str, Callable[[str], BaseException]] = {
    "fail": lambda point: NotPermitted(f"go on behind {point}", f"{VARIABLE} forbids it"),
    "full": lambda point: HostFull(f"no room behind {point}", f"{VARIABLE} leaves none"),
    "starve": lambda _: MemoryError(),
}
_ACTIONS = frozenset({"cut", "wait", "note", *_ERRORS, *_SIGNALS})


def _require(kind: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UsageError(f"{VARIABLE}: there is no {kind} {name!r}; ckpt/fault.py has the list")


def _cut(connection: int) -> None:
    # All of us import this module, and few have a connection.
    import socket

    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection)) as same:
        same.shutdown(socket.SHUT_RDWR)


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


def plan(text: str) -> None:
    """Let a fault happen in this process, instead of the one that was planned.

    State: too late for a feature that is a number (`number`), which was looked up by then.

    Raises:
        UsageError: see `Fault.read`.
    """
    planned = Fault.read({VARIABLE: text})
    _planned[:] = [planned] if planned else []


def forget() -> None:
    """Let nothing happen in this process from here on."""
    _planned.clear()


def is_off(feature: str) -> bool:
    """Tell whether a feature is to be taken for missing."""
    return any(one.point == _WITHOUT + feature for one in _planned)


def number(feature: str, number: int) -> int:
    """Return the number of a call or request, or, where it is off, one that no kernel knows."""
    return number + _UNKNOWN if is_off(feature) else number


def require_message(names: Collection[str]) -> None:
    """Refuse a fault at a message that does not exist.

    Raises:
        UsageError: there is none of that name.
    """
    for one in _planned:
        _, _, name = one.point.partition(":")
        if name:
            _require("message", name, names)
