"""Whether the processes of a tree live on, asked when the ckpt that held them has been killed.

A tracer's end lets them run, or (PTRACE_O_EXITKILL) ends them, each by itself. A tree of which some
have ended is no copy that anybody may have: the rest is ended, too.
"""

import contextlib
import os
import select
import signal
import struct
import time
from collections.abc import Iterable
from typing import Self

import attrs

from ckpt.errors import TargetGone
from ckpt.kernel.pidfd import pidfd_open, pidfd_send_signal
from ckpt.kernel.procfs.files import list_tids
from ckpt.kernel.procfs.stat import read_task_stat
from ckpt.process.tree import read_identity
from ckpt.units import Fd, Pid

_LINE = struct.Struct("<IQ")
_PF_EXITING = 0x4
_DYING_S = 2.0
"""How long the first may take to end: SIGKILL waits for no more than a system call."""


@attrs.frozen(slots=True)
class Member:
    """A process, by its number and when it was started."""

    pid: Pid
    start_ticks: int

    @classmethod
    def read(cls, pid: Pid) -> Self:
        """Return the process that has a number now.

        Raises:
            TargetGone: nobody has it.
        """
        return cls(pid, read_identity(pid).start_ticks)


def pack_members(members: Iterable[Member]) -> bytes:
    """Write members for a pipe."""
    return b"".join(_LINE.pack(member.pid, member.start_ticks) for member in members)


def unpack_members(raw: bytes) -> list[Member]:
    """Return what `pack_members` wrote."""
    return [Member(Pid(pid), ticks) for pid, ticks in _LINE.iter_unpack(raw)]


class Fates:
    """Holds processes by pidfds; their numbers may be given to others."""

    def __init__(self, members: Iterable[Member]) -> None:
        """Take hold of those that still live."""
        members = list(members)
        self.root = members[0].pid
        """The first of them."""
        self._held: dict[Fd, Pid] = {}
        self._some_ended = False
        for member in members:
            fd = _hold(member)
            if fd is None:
                self._some_ended = True
            else:
                self._held[fd] = member.pid

    def settle(self) -> bool:
        """Tell whether all live on, and end all if not.

        State: who traced them has ended.
        """
        if not self._some_ended:
            poll = select.poll()
            for fd in self._held:
                poll.register(fd, select.POLLIN)
            if not poll.poll(_DYING_S * 1000) and not any(map(_is_ending, self._held.values())):
                return True
        self.end_all()
        return False

    def end_all(self) -> None:
        """End those that live, and wait for that."""
        for fd, pid in self._held.items():
            with contextlib.suppress(TargetGone):
                pidfd_send_signal(fd, signal.SIGKILL, pid=pid)
        give_up_s = time.monotonic() + _DYING_S
        for fd in self._held:
            select.select([fd], [], [], max(0.0, give_up_s - time.monotonic()))


def _hold(member: Member) -> Fd | None:
    try:
        fd = pidfd_open(member.pid)
        if read_identity(member.pid).start_ticks == member.start_ticks:
            return fd
    except TargetGone:
        return None
    os.close(fd)
    return None


def _is_ending(pid: Pid) -> bool:
    """Tell whether a process is on its way out: giving back much memory takes its time."""
    try:
        return all(read_task_stat(pid, tid).flags & _PF_EXITING for tid in list_tids(pid))
    except TargetGone:
        return True


def wait_until_ended(pidfd: Fd) -> None:
    """Wait for the end of a process: what it traced has been let go or killed then."""
    select.select([pidfd], [], [])
