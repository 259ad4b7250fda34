"""Locks that a process holds on the files it has open.

    kind    belongs to               asked for by        gone with
    POSIX   process and file         F_SETLK             any close of that file by the process
    OFD     open file description    F_OFD_SETLK         the last close of the description
    FLOCK   open file description    flock(2)            the last close of the description
    LEASE   open file description    F_SETLEASE          the last close of the description

The `lock:` lines of fdinfo show each of them once, at the description that it was asked through.
They are taken again inside the restored process, after the last descriptor was closed there.

Kernel: fcntl_locking(2), flock(2), proc_pid_fdinfo(5), fs/locks.c (`show_fd_locks`).

A lease tells its owner by a signal that somebody wants to open the file (see `owners`).

Refused where the original still holds them, on a file system that both hosts have: it keeps them
until it has ended, and that is later (`find_held`).

Refused before the target is stopped: a lease that is being broken, delegations, mandatory locks. A
lock that another process has taken meanwhile fails the restore, so does a lease on a file that
somebody has open in a way that it excludes. Between the end of the old process and the restore
nothing holds the locks.
"""

import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Iterator

import attrs

from ckpt.errors import RestoreFailed
from ckpt.kernel.arch import NR
from ckpt.kernel.procfs.fdinfo import FdInfo, FileLock
from ckpt.process.remote import Call, In, InOut, Reply, call
from ckpt.resources.base import Restore, expect
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.units import RemoteFd

_FLOCK = struct.Struct("<hh4xqqi4x")
"""`struct flock` of include/uapi/asm-generic/fcntl.h: type, whence, start, len, pid."""
_SEEK_SET = 0
_EAGAIN, _EACCES = 11, 13
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_SET = {"POSIX": fcntl.F_SETLK, "OFDLCK": _F_OFD_SETLK}
_GET = {"POSIX": fcntl.F_GETLK, "OFDLCK": _F_OFD_GETLK}
_WHOLE_FILES, _LEASE = "FLOCK", "LEASE"
_KINDS = (*_SET, _WHOLE_FILES, _LEASE)
_TO_THE_END = -1
_REFUSED = {"DELEG": "a delegation"}
_F_SETLEASE = 1024


@attrs.frozen(slots=True, repr=False)
class LockRecord:
    """One lock on one file."""

    kind: str
    """`POSIX`, `OFDLCK`, `FLOCK` or `LEASE`, as the kernel calls them."""
    exclusive: bool
    """For writing; else shared."""
    first_byte: int
    last_byte: int
    """-1: up to the end of the file, however it grows."""

    def __attrs_post_init__(self) -> None:
        """Refuse what neither fcntl nor flock would take."""
        if self.kind not in _KINDS:
            raise ValueError(f"unknown kind of lock {self.kind!r}")
        if self.first_byte < 0 or (
            self.last_byte != _TO_THE_END and self.last_byte < self.first_byte
        ):
            raise ValueError(f"no bytes can be locked from {self.first_byte} to {self.last_byte}")

    @property
    def is_of_process(self) -> bool:
        """Tell whether it belongs to the process, not to the description."""
        return self.kind == "POSIX"

    @property
    def type(self) -> int:
        """F_RDLCK or F_WRLCK."""
        return fcntl.F_WRLCK if self.exclusive else fcntl.F_RDLCK

    @property
    def flock(self) -> bytes:
        """Its `struct flock`."""
        length = 0 if self.last_byte == _TO_THE_END else self.last_byte - self.first_byte + 1
        return _FLOCK.pack(self.type, _SEEK_SET, self.first_byte, length, 0)


def problem(file: OpenFile) -> Problem | None:
    """Tell why the locks on a description cannot be captured; None if they can, or are none."""
    refused = sorted({what for what in map(_refuse, file.info.locks) if what})
    if not refused:
        return None
    return Problem(f"holds {' and '.join(refused)} on the file, which is not supported")


def has_lease(info: FdInfo) -> bool:
    """Tell whether a lease is held through a descriptor."""
    return any(lock.kind == _LEASE for lock in info.locks)


def _refuse(lock: FileLock) -> str:
    """Return what a user calls a lock that cannot be captured; empty if it can."""
    if lock.kind not in _KINDS:
        return _REFUSED.get(lock.kind, f"a lock of kind {lock.kind}")
    if lock.kind == _LEASE:
        return "" if lock.state == "ACTIVE" else "a lease that is being broken"
    if lock.state != "ADVISORY" or lock.mode not in ("READ", "WRITE"):
        return "a mandatory lock"
    return ""


def capture(file: OpenFile) -> tuple[LockRecord, ...]:
    """Return the locks that are held through a description."""
    return tuple(
        LockRecord(
            kind=lock.kind,
            exclusive=lock.mode == "WRITE",
            first_byte=lock.start,
            last_byte=_TO_THE_END if lock.end is None else lock.end,
        )
        for lock in file.info.locks
        # What stands in for a file that is gone (`external`) is captured whatever is held on that.
        if not _refuse(lock)
    )


def find_held(locks: Iterable[LockRecord], path: str) -> Iterator[Problem]:
    """Tell which locks cannot be had while the original of the process has them.

    Args:
        locks: that it holds.
        path: of the file, here; not opened if there is a lease, which that would break.
    """
    locks = tuple(locks)
    if any(lock.kind == _LEASE for lock in locks):
        yield Problem("had a lease on it, which opening it here may break", _RELEASE)
    elif any(_is_held(lock, path) for lock in locks):
        yield Problem("had a lock on it that is held until its original has ended", _RELEASE)


_RELEASE = "let it release that, or use 'ckpt dump --kill' and 'ckpt restore'"


def _is_held(lock: LockRecord, path: str) -> bool:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        # That it is missing is said elsewhere.
        return False
    try:
        if lock.kind == _WHOLE_FILES:
            fcntl.flock(fd, (fcntl.LOCK_EX if lock.exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            return False
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(fd, _F_OFD_GETLK, lock.flock))
        return bool(kind != fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def restore(locks: Iterable[LockRecord], fd: RemoteFd, name: str) -> Restore:
    """Take the locks again, through `fd`, a descriptor of the restored process.

    Raises:
        RestoreFailed: another process holds one of them now.
    """
    locks = tuple(locks)
    replies = yield [_plan(lock, fd) for lock in locks]
    for lock, reply in zip(locks, replies, strict=True):
        if reply.error in (_EAGAIN, _EACCES):
            if lock.kind == _LEASE:
                raise RestoreFailed(f"locking {name}", _IN_USE)
            raise RestoreFailed(f"locking {name}", _explain((yield _plan_asking(lock, fd))))
    expect(f"locking {name}", replies)


_IN_USE = "another process has it open, so no lease on it is given; end its use"


def _plan(lock: LockRecord, fd: RemoteFd) -> Call:
    if lock.kind == _WHOLE_FILES:
        operation = fcntl.LOCK_EX if lock.exclusive else fcntl.LOCK_SH
        return call(NR.flock, fd, operation | fcntl.LOCK_NB)
    if lock.kind == _LEASE:
        return call(NR.fcntl, fd, _F_SETLEASE, lock.type)
    return call(NR.fcntl, fd, _SET[lock.kind], In(lock.flock))


def _plan_asking(lock: LockRecord, fd: RemoteFd) -> list[Call]:
    """Return what asks who holds a lock; nothing can for flock."""
    if lock.kind == _WHOLE_FILES:
        return []
    return [call(NR.fcntl, fd, _GET[lock.kind], InOut(lock.flock))]


def _explain(replies: list[Reply]) -> str:
    """Say who holds a lock that was refused, as far as the kernel tells."""
    holder = "another process"
    for reply in replies:
        kind, _, _, _, pid = _FLOCK.unpack(reply.outs[0])
        # An OFD lock belongs to no process: the kernel says -1.
        if reply.ok and kind != fcntl.F_UNLCK and pid > 0:
            holder = f"process {pid}"
    return f"{holder} holds a lock on it that the checkpoint had; end that process, or its use"
