"""Files that can be opened only when the processes of the tree exist: pidfds, files of /proc/PID.

    restorer     opens a placeholder in place of each: an anonymous file that says what to open
    processes    inherit it, and put it under its numbers like any other
    then         the first process that has one opens what it says, puts that in its place, and
                 notes in the placeholder where it is; the others fetch it there

So one description stays one, whoever shares it, and whoever comes first.

Kernel: memfd_create(2), openat(2), pidfd_open(2), pidfd_getfd(2) by calls inside the processes:
each in its own namespaces.
"""

import json
import os
import re
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import attrs

from ckpt.errors import RestoreFailed
from ckpt.kernel.arch import NR
from ckpt.kernel.procfs.fdinfo import read_fdinfo
from ckpt.process.remote import Call, In, Reply, call
from ckpt.resources.base import Rebuilt, Restore, expect
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import flags_for_open
from ckpt.units import Fd, RemoteFd

_NAME = "ckpt-placeholder"
_LINK = f"/memfd:{_NAME} (deleted)"
_AT_FDCWD = 2**64 - 100
_PROC_PID = re.compile(rb"^/proc/(\d+)(?=/)")
_PATH, _PIDFD, _UNDER_WAY, _MADE = "path", "pidfd", "under way", "made"


def hold_path(path: str, flags: int, offset: int) -> Fd:
    """Return a placeholder for a file that the first process opens under `path`, at an offset."""
    return _hold([_PATH, os.fsencode(path).hex(), flags, offset])


def hold_pidfd(pid: int, flags: int) -> Fd:
    """Return a placeholder for a pidfd of a process, by the number that the tree knows it under."""
    return _hold([_PIDFD, pid, flags])


def _hold(order: list[Any]) -> Fd:
    fd = Fd(os.memfd_create(_NAME, os.MFD_CLOEXEC))
    _write(fd, order)
    return fd


def _write(fd: int, order: list[Any]) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(order).encode(), 0)


@attrs.frozen(slots=True, repr=False)
class _Placeholder:
    """One that a process has."""

    fds: tuple[RemoteFd, ...]
    ours: Fd
    """A descriptor of ours on the same file."""

    @property
    def order(self) -> list[Any]:
        """What it says."""
        order: list[Any] = json.loads(os.pread(self.ours, 1 << 20, 0))
        return order


def bring_in(rebuilt: Rebuilt) -> Restore:
    """Put into a process what its placeholders stand for.

    State:  every descriptor of the process has its number; the processes of the tree exist.

    Raises:
        RestoreFailed: one of them cannot be opened.
    """
    found = list(_find(rebuilt))
    try:
        for placeholder in found:
            yield from _replace(placeholder, rebuilt)
    finally:
        for placeholder in found:
            os.close(placeholder.ours)


def _find(rebuilt: Rebuilt) -> Iterator[_Placeholder]:
    folder = f"/proc/{rebuilt.pid}/fd"
    groups: dict[int, list[RemoteFd]] = {}
    for name in sorted(os.listdir(folder), key=int):
        if os.readlink(f"{folder}/{name}") == _LINK:
            number = os.stat(f"{folder}/{name}").st_ino
            groups.setdefault(number, []).append(RemoteFd(int(name)))
    for fds in groups.values():
        ours = Fd(os.open(f"{folder}/{fds[0]}", os.O_RDWR | os.O_CLOEXEC))
        yield _Placeholder(tuple(fds), ours)


def _replace(placeholder: _Placeholder, rebuilt: Rebuilt) -> Restore:
    (own,) = yield [call(NR.getpid)]
    what, *rest = placeholder.order
    while what == _UNDER_WAY:
        # Another process is about it, in the same rounds.
        yield []
        what, *rest = placeholder.order
    if what != _MADE:
        _write(placeholder.ours, [_UNDER_WAY])
    if what == _MADE:
        made = yield from _fetch(*rest)
    elif what == _PIDFD:
        made = yield from _make_pidfd(*rest)
    else:
        made = yield from _open(rebuilt, *rest)
    close_on_exec = {fd for fd in placeholder.fds if _closes_on_exec(rebuilt, fd)}
    replies = yield [
        *(
            call(NR.dup3, made, fd, os.O_CLOEXEC if fd in close_on_exec else 0)
            for fd in placeholder.fds
        ),
        call(NR.close, made),
    ]
    expect("placing descriptors", replies)
    if what != _MADE:
        _write(placeholder.ours, [_MADE, own.value, placeholder.fds[0]])


def _closes_on_exec(rebuilt: Rebuilt, fd: RemoteFd) -> bool:
    info = read_fdinfo(rebuilt.pid, fd)
    return info is not None and info.close_on_exec


_Making = Generator[list[Call], list[Reply], int]
"""As `Restore`, and returns the descriptor in the process."""


def _open(rebuilt: Rebuilt, path_hex: str, flags: int, offset: int) -> _Making:
    path = bytes.fromhex(path_hex)
    # By the mount that the process sees, it knows at least itself.
    inside = _PROC_PID.sub(partial(_name_as_seen, rebuilt), path)
    (opened,) = yield [call(NR.openat, _AT_FDCWD, In(inside + b"\0"), flags_for_open(flags))]
    _judge(f"opening {os.fsdecode(path)}", opened)
    if offset and not flags & os.O_PATH:
        (moved,) = yield [call(NR.lseek, opened.value, offset, os.SEEK_SET)]
        _judge(f"going to byte {offset} of {os.fsdecode(path)}", moved)
    return opened.value


def _name_as_seen(rebuilt: Rebuilt, found: re.Match[bytes]) -> bytes:
    """Return the directory of a process of the tree below the /proc that the process sees."""
    number = int(found[1])
    seen_as = rebuilt.seen_as.get(number, number)
    return b"/proc/self" if number == rebuilt.number else b"/proc/%d" % seen_as


def _make_pidfd(pid: int, flags: int) -> _Making:
    (opened,) = yield [call(NR.pidfd_open, pid, flags)]
    _judge(f"opening a pidfd of process {pid}", opened)
    return opened.value


def _fetch(pid: int, fd: int) -> _Making:
    (holder,) = yield [call(NR.pidfd_open, pid, 0)]
    _judge(f"opening a pidfd of process {pid}", holder)
    fetched, closed = yield [
        call(NR.pidfd_getfd, holder.value, fd, 0),
        call(NR.close, holder.value),
    ]
    _judge(f"fetching descriptor {fd} of process {pid}", fetched)
    expect("closing a pidfd", [closed])
    return fetched.value


def _judge(step: str, reply: Reply) -> None:
    if not reply.ok:
        raise RestoreFailed(step, os.strerror(reply.error))


def pids_of_tree(table: FdTable) -> set[int]:
    """Return the processes of the tree that have anything open."""
    numbers = table.tree.numbers
    pids = {table.pid, *(pid for file in table.files for pid, _ in file.slots)}
    return pids | {numbers.get(pid, pid) for pid in pids}


def is_of_tree(pid: int, table: FdTable) -> bool:
    """Tell whether a process belongs to the tree."""
    return pid in pids_of_tree(table)
