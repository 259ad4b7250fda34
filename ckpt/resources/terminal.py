"""The controlling terminal of a session, and the group in its foreground.

    leader  setsid, TIOCSCTTY      before its session has other members: they inherit it by fork
     ├ a shell's job 1
     └ a shell's job 2             TIOCSPGRP, when all groups exist

A terminal whose master is in the tree is made by `files.pty`. One from outside is that of the
restoring command: a session gets it if the command leads the session that has it now (as when it
is what a terminal window runs), since then no shell loses it. Otherwise the session has none, and
the user is told. Its settings come back, for whoever draws on a terminal has set them; its size
does not, but the foreground hears by SIGWINCH if that is another one.

Kernel: ioctl_tty(2) TIOCSCTTY, TIOCSPGRP, TCSETS2; `tty_nr` and `tpgid` of proc_pid_stat(5).

Not captured: members of a session that have given up its terminal (TIOCNOTTY).
"""

import os
import signal
import struct

import attrs

from ckpt.kernel import tty
from ckpt.kernel.arch import NR
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.kernel.procfs.files import list_fds
from ckpt.kernel.procfs.stat import read_stat
from ckpt.process.pid_space import Numbers
from ckpt.process.remote import Call, In, Out, call
from ckpt.resources.base import (
    Capture,
    Rebuilt,
    Resource,
    Restore,
    Stage,
    Stopped,
    Tree,
    expect,
)
from ckpt.resources.files.pty_ends import numbers_of_masters
from ckpt.units import Pid, RemoteFd

_NONE = -1
_AT_FDCWD = -100
_UNSIGNED = 0xFFFF_FFFF
_INT = struct.Struct("<i")
_SIZE = struct.Struct("<4H")
_ENOTTY = 25
_MASTERS = "masters of pseudo-terminals"


@attrs.frozen(slots=True, repr=False)
class TerminalRecord:
    """The controlling terminal of a process."""

    device: int
    """Its device number; 0 if there is none."""
    leads: bool
    """The process leads the session that the terminal controls."""
    inside: bool
    """Its master is open in the tree."""


@attrs.frozen(slots=True, repr=False)
class ForegroundRecord:
    """How a terminal is used. What one process tells of it, the others need not."""

    fd: int
    """A descriptor of the process on it; -1 if there is none."""
    leads: bool
    """The process leads the session that the terminal controls."""
    group: int
    """In the foreground; 0 if there is none, or another process tells."""
    settings: bytes
    """`struct termios2` of a terminal from outside; empty if it comes back with its master."""
    size: tuple[int, int, int, int]
    """Of the same."""

    def __attrs_post_init__(self) -> None:
        """Refuse settings that are cut short."""
        if len(self.settings) not in (0, tty.TERMIOS2_BYTES):
            raise ValueError("settings of a terminal are cut short")


def _find_fd(pid: Pid, device: int) -> RemoteFd | None:
    """Return a descriptor of the process on its controlling terminal."""
    for fd in list_fds(pid) if device else ():
        try:
            if os.stat(f"/proc/{pid}/fd/{fd}").st_rdev == device:
                return fd
        except OSError:
            continue
    return None


def _is_inside(device: int, tree: Tree) -> bool:
    """Tell whether some process of the tree has the master."""
    if tree.claim(_MASTERS):
        tree.notes[_MASTERS] = {n for pid in tree.pids for n in numbers_of_masters(pid)}
    is_slave = os.major(device) == tty.SLAVE_MAJOR
    return is_slave and os.minor(device) in tree.notes[_MASTERS]


def capture(stopped: Stopped) -> Capture[TerminalRecord]:
    """Read it from outside."""
    stat = stopped.frozen.stat
    device = stat.tty_nr & _UNSIGNED
    inside = bool(device) and _is_inside(device, stopped.tree)
    yield []
    return TerminalRecord(
        device=device,
        leads=bool(device) and stat.session == int(stopped.frozen.number),
        inside=inside,
    )


def restore(record: TerminalRecord, rebuilt: Rebuilt) -> Restore:
    """Let the leader of a session take its terminal, by the name that it has in our file system.

    Raises:
        RestoreFailed: the kernel refused a terminal of the tree.
    """
    if not record.leads:
        return
    device, steal = record.device, 0
    if not record.inside:
        device, steal = _our_terminal(), 1
    if os.major(device) != tty.SLAVE_MAJOR:
        rebuilt.warn(
            f"session {rebuilt.pid} had a terminal outside the tree, and has none now (a command"
            " that leads a session, as by `setsid -c`, can give it its own)"
        )
        return
    path = f"/dev/pts/{os.minor(device)}"
    opened = yield [_plan_opening(path)]
    expect(f"opening {path}", opened)
    fd = opened[0].value
    taken, _ = yield [call(NR.ioctl, fd, tty.TIOCSCTTY, steal), call(NR.close, fd)]
    expect("taking the controlling terminal", [taken])


def _plan_opening(path: str) -> Call:
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    return call(NR.openat, _AT_FDCWD, In(path.encode() + b"\0"), flags, 0)


def _our_terminal() -> int:
    """Return the device number of the terminal of a session that we lead ourselves; else 0."""
    ours = read_stat(Pid(os.getpid()))
    return ours.tty_nr & _UNSIGNED if ours.session == os.getpid() else 0


def capture_foreground(stopped: Stopped) -> Capture[ForegroundRecord]:
    """Read it from outside."""
    yield []
    stat = stopped.frozen.stat
    device = stat.tty_nr & _UNSIGNED
    fd = _find_fd(stopped.pid, device)
    leads = bool(device) and stat.session == int(stopped.frozen.number)
    settings, size = b"", (0, 0, 0, 0)
    outside = fd is not None and not _is_inside(device, stopped.tree)
    # One of those that use it is enough to tell.
    if fd is not None and outside and stopped.tree.claim((FOREGROUND.name, device)):
        settings, size = _read_outside(stopped.pid, fd)
    return ForegroundRecord(
        fd=_NONE if fd is None else fd,
        leads=leads,
        group=max(stat.tpgid, 0) if leads or settings else 0,
        settings=settings,
        size=size,
    )


def renumber(record: ForegroundRecord, numbers: Numbers) -> ForegroundRecord:
    """See `Resource.renumber`: /proc tells the group as we see it."""
    return attrs.evolve(record, group=numbers.of(record.group))


def _read_outside(pid: Pid, fd: RemoteFd) -> tuple[bytes, tty.Size]:
    pidfd = pidfd_open(pid)
    try:
        ours = pidfd_getfd(pidfd, fd, pid=pid)
        try:
            return tty.get_settings(ours), tty.get_size(ours)
        finally:
            os.close(ours)
    finally:
        os.close(pidfd)


def restore_foreground(record: ForegroundRecord, rebuilt: Rebuilt) -> Restore:
    """Set the group in the foreground, and what a terminal from outside was set to."""
    if record.leads and record.group:
        yield from _set_group(record, rebuilt)
    if record.settings and record.fd != _NONE:
        # It may be no terminal now.
        replies = yield [
            call(NR.ioctl, record.fd, tty.TCSETS2, In(record.settings)),
            call(NR.ioctl, record.fd, tty.TIOCGWINSZ, Out(_SIZE.size)),
        ]
        if replies[1].ok and _SIZE.unpack(replies[1].outs[0]) != record.size and record.group:
            yield [call(NR.kill, -record.group, signal.SIGWINCH)]


def _set_group(record: ForegroundRecord, rebuilt: Rebuilt) -> Restore:
    fd = record.fd
    if fd == _NONE:
        (opened,) = yield [_plan_opening("/dev/tty")]
        if not opened.ok:
            return  # it has no terminal, and the user was told
        fd = opened.value
    (reply,) = yield [call(NR.ioctl, fd, tty.TIOCSPGRP, In(_INT.pack(record.group)))]
    if record.fd == _NONE:
        yield [call(NR.close, fd)]
    if not reply.ok and reply.error != _ENOTTY:
        rebuilt.warn(
            f"process group {record.group} was in the foreground of the terminal, and does not"
            " exist: nobody is now"
        )


TERMINAL = Resource("terminal", TerminalRecord, Stage.SESSION, capture=capture, restore=restore)
FOREGROUND = Resource(
    "foreground",
    ForegroundRecord,
    Stage.LATE,
    capture=capture_foreground,
    restore=restore_foreground,
    renumber=renumber,
)
