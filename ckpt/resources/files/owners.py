"""Who gets a signal when a descriptor becomes ready (SIGIO, SIGURG), and which one.

A resource of its own, restored late: an owner may be a thread, and threads are made after the
descriptors. O_ASYNC is set here too, since it is the owner that it alarms.

Kernel: fcntl(2) F_SETOWN_EX, F_SETSIG, F_SETFL with O_ASYNC, asked and set inside the process. Only
pipes, sockets, terminals and the like are asked, and where leases are held (fdinfo) all files:
nothing else ever sends such a signal, and an owner that a program has set there without effect is
lost.

Refused before the target is stopped: an owner outside the tree, be it a process, a thread, or a
process group that nobody of the tree is in. An owner that does not exist after the restore is left
out, said aloud.
"""

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator, Mapping, Sequence

import attrs

from ckpt.errors import Finding, TargetGone
from ckpt.kernel.arch import NR
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.kernel.procfs.files import list_fds, list_tids
from ckpt.process.clones import Common
from ckpt.process.remote import Call, In, Out, Reply, call
from ckpt.resources.base import (
    Capture,
    Later,
    Rebuilt,
    Resource,
    Restore,
    Stage,
    Stopped,
    Target,
    Tree,
    expect,
)
from ckpt.resources.files.open_file import LEASES, LINKS
from ckpt.units import Fd, Pid, RemoteFd

_F_SETOWN_EX, _F_GETOWN_EX = 15, 16
_OWNER = struct.Struct("<ii")
"""`struct f_owner_ex`: type, pid."""
_TID, _PID, _PGRP = 0, 1, 2
O_ASYNC = 0o20000
_CAN_SIGNAL = (
    *("pipe:", "socket:", "/dev/tty", "/dev/pts/", "/dev/ptmx", "/dev/console", "/dev/random"),
    "anon_inode:inotify",
)
_MAX_SIGNAL = 64


@attrs.frozen(slots=True, repr=False)
class Owner:
    """The owner of one descriptor's open file description."""

    fd: int
    kind: int
    """F_OWNER_TID, F_OWNER_PID or F_OWNER_PGRP."""
    pid: int
    """0 if there is none, or it has ended."""
    signal: int
    """0 for SIGIO without details."""
    asynchronous: bool
    """O_ASYNC is set."""

    def __attrs_post_init__(self) -> None:
        """Refuse what F_SETOWN_EX and F_SETSIG would not take."""
        if self.kind not in (_TID, _PID, _PGRP) or not 0 <= self.signal <= _MAX_SIGNAL:
            raise ValueError("an owner of a file has a kind of 0 to 2 and a signal of 0 to 64")


@attrs.frozen(slots=True, repr=False)
class OwnersRecord:
    """Every descriptor that has an owner, a signal or O_ASYNC (duplicates too)."""

    owners: tuple[Owner, ...]


def _read_links(pid: Pid) -> dict[RemoteFd, str]:
    links: dict[RemoteFd, str] = {}
    for fd in list_fds(pid):
        with contextlib.suppress(FileNotFoundError):
            links[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return links


def _list_signalling(links: Mapping[RemoteFd, str], *, leases: bool) -> list[RemoteFd]:
    """Return the descriptors that can send a signal at all."""
    if leases:
        return list(links)
    return [fd for fd, link in links.items() if link.startswith(_CAN_SIGNAL)]


def _hold_leases(tree: Tree) -> bool:
    """Tell whether somebody of a tree that runs has asked for a lease.

    The kernel lets all lockers of the host wait for that, and waits for all its processors itself
    (10 ms): of a tree that stands still `LEASES` tells it.
    """
    if tree.claim(_LEASES):
        tree.notes[_LEASES] = _read_leases(tree)
    leases: bool = tree.notes[_LEASES]
    return leases


_LEASES = "leases of a tree that runs"


def _read_leases(tree: Tree) -> bool:
    pids = {str(tree.numbers.get(pid, pid)) for pid in tree.pids}
    with open("/proc/locks", encoding="ascii") as locks:
        lines = map(str.split, locks)
        return any(words[1] == "LEASE" and words[4] in pids for words in lines)


def _list_owners(tree: Tree) -> set[tuple[int, int]]:
    """Return kind and number of all processes, threads and groups of the tree; asked for once."""
    if tree.claim(_OWNERS):
        tree.notes[_OWNERS] = _read_owners(tree)
    owners: set[tuple[int, int]] = tree.notes[_OWNERS]
    return owners


_OWNERS = "who may own"


def _read_owners(tree: Tree) -> set[tuple[int, int]]:
    owners: set[tuple[int, int]] = set()
    for pid in tree.pids:
        with contextlib.suppress(OSError, TargetGone):
            owners |= {(_PID, int(tree.numbers.get(pid, pid))), (_PGRP, os.getpgid(pid))}
            owners |= {(_TID, int(tid)) for tid in list_tids(pid)}
    return owners


def look(target: Target) -> Iterator[Finding]:
    """Name every descriptor that alarms somebody else."""
    pid = target.pid
    fds = _list_signalling(_read_links(pid), leases=_hold_leases(target.tree))
    if not fds:
        return
    own = _list_owners(target.tree)
    pidfd = pidfd_open(pid)
    try:
        for fd in fds:
            owner = _read_owner(pidfd, fd, pid)
            if owner[1] and owner not in own:
                whom = f"process group {owner[1]}" if owner[0] == _PGRP else f"process {owner[1]}"
                yield Finding(f"fd {fd}", f"signals {whom} when it is ready (F_SETOWN)")
    finally:
        os.close(pidfd)


def _read_owner(pidfd: Fd, fd: RemoteFd, pid: Pid) -> tuple[int, int]:
    """Return kind and pid; pid 0 if there is no owner, or the descriptor was closed meanwhile."""
    try:
        here = pidfd_getfd(pidfd, fd, pid=pid)
    except OSError:
        return _PID, 0
    try:
        kind, owner = _OWNER.unpack(fcntl.fcntl(here, _F_GETOWN_EX, bytes(_OWNER.size)))
    except OSError:
        return _PID, 0
    finally:
        os.close(here)
    return kind, owner


def capture(stopped: Stopped) -> Capture[OwnersRecord]:
    """Ask inside: pids are those that the process itself knows."""
    links = stopped.notes.get(LINKS) or _read_links(stopped.pid)
    fds = _list_signalling(links, leases=stopped.tree.notes.get(LEASES, True))
    replies = yield [one for fd in fds for one in _plan_asking(fd)]
    return Later(lambda: _record_of(fds, replies))


def _record_of(fds: Sequence[RemoteFd], replies: Sequence[Reply]) -> OwnersRecord:
    owners: list[Owner] = []
    for at, fd in enumerate(fds):
        flags, owner, sig = replies[3 * at : 3 * at + 3]
        if not owner.ok:
            continue  # O_PATH
        kind, pid = _OWNER.unpack(owner.outs[0])
        asynchronous = bool(flags.value & O_ASYNC)
        if pid or sig.value or asynchronous:
            owners.append(Owner(fd, kind, pid, sig.value, asynchronous))
    return OwnersRecord(tuple(owners))


def _plan_asking(fd: RemoteFd) -> list[Call]:
    return [
        call(NR.fcntl, fd, fcntl.F_GETFL),
        call(NR.fcntl, fd, _F_GETOWN_EX, Out(_OWNER.size)),
        call(NR.fcntl, fd, fcntl.F_GETSIG),
    ]


def restore(record: OwnersRecord, rebuilt: Rebuilt) -> Restore:
    """Set owner, signal and O_ASYNC, in this order."""
    owned = [owner for owner in record.owners if owner.pid]
    replies = yield [
        call(NR.fcntl, owner.fd, _F_SETOWN_EX, In(_OWNER.pack(owner.kind, owner.pid)))
        for owner in owned
    ]
    for owner, reply in zip(owned, replies, strict=True):
        if not reply.ok:
            rebuilt.warn(f"fd {owner.fd} signalled {owner.pid}, which does not exist: nobody now")
    signalling = [owner for owner in record.owners if owner.signal]
    expect(
        "setting signals of descriptors",
        (yield [call(NR.fcntl, owner.fd, fcntl.F_SETSIG, owner.signal) for owner in signalling]),
    )
    alarmed = [owner for owner in record.owners if owner.asynchronous]
    flags = yield [call(NR.fcntl, owner.fd, fcntl.F_GETFL) for owner in alarmed]
    expect("reading flags of descriptors", flags)
    expect(
        "setting O_ASYNC",
        (
            yield [
                call(NR.fcntl, owner.fd, fcntl.F_SETFL, reply.value | O_ASYNC)
                for owner, reply in zip(alarmed, flags, strict=True)
            ]
        ),
    )


FILE_OWNERS = Resource(
    "file_owners",
    OwnersRecord,
    Stage.LATE,
    capture=capture,
    restore=restore,
    common=Common.FILES,
    look=look,
)
