"""inotify instances: what they watch, under the same watch numbers.

    the process has     1 /etc    4 /var/log    5 /srv        (2 and 3 were removed)
    we add              1 /etc    2 3 (given up again)    4 /var/log    5 /srv

The kernel gives numbers that only go up, so those between are used up on a file of ours; that costs
about a second for a million. Watches are added once everything is open, so that the opening tells
nothing; they are watches of inodes, and are added by a name that the inode has.

Kernel: inotify(7); fdinfo for number, inode and mask of each watch (`show_fdinfo` in
fs/notify/fdinfo.c); `inode_path` for the name; FIONREAD for events that were not read.

Refused before the target is stopped: a watch of an inode whose name cannot be found, or that is
deleted.

Not exactly as it was:

- Events that were not read are lost: nobody can look at them without taking them away. In their
  place the process reads one IN_Q_OVERFLOW, inotify's own word for it (Linux says it of more than
  16,384 events), upon which a program looks for itself; said aloud. What happens to the files
  while the process does not exist is told by nothing.
- IN_ONESHOT and IN_EXCL_UNLINK are told from Linux 5.19 on; before, they get lost.
- The next new watch may get a number that was used before.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator

import attrs

from ckpt.errors import RestoreFailed
from ckpt.kernel.arch import NR
from ckpt.kernel.burst import Burst
from ckpt.kernel.inotify import (
    EVENT_HEADER,
    IN_ACCESS,
    IN_DELETE_SELF,
    IN_DONT_FOLLOW,
    IN_IGNORED,
    IN_MASK_CREATE,
    IN_MODIFY,
    count_unread_bytes,
    inotify_add_watch,
    inotify_init,
    inotify_rm_watch,
    read_max_queued_events,
)
from ckpt.kernel.libc import readable_address, writable_address
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.kernel.procfs.fdinfo import InotifyWatch
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening, Restore, RestoreOptions
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.inode_path import Inode, find_paths
from ckpt.resources.files.kind import Attaching, Kind, set_status_flags
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.units import Fd, Pid, RemoteFd

_NAME = "anon_inode:inotify"
_MAX_WATCH = 2**31 - 1
_AT_ONCE = 4096
"""Watch numbers that are used up between two looks at the queue."""
_CHUNK_BYTES = 1 << 16


@attrs.frozen(slots=True, repr=False)
class WatchRecord:
    """One watch."""

    watch: int
    """Its number."""
    mask: int
    inode: Inode
    """On the machine where it was captured."""
    path: str
    """Empty if it was renamed or removed while it was captured."""
    is_link: bool
    """A symbolic link is watched, not what it leads to."""

    def __attrs_post_init__(self) -> None:
        """Refuse what no watch can be."""
        if not 1 <= self.watch <= _MAX_WATCH or not 0 < self.mask < 2**32:
            raise ValueError(f"there is no watch {self.watch} for {self.mask:#x}")


@attrs.frozen(slots=True, repr=False)
class InotifyRecord:
    """An instance."""

    watches: tuple[WatchRecord, ...]
    """Ascending by number."""
    unread_bytes: int
    """Of events that were queued."""

    def __attrs_post_init__(self) -> None:
        """Refuse watches that are in no order."""
        numbers = [watch.watch for watch in self.watches]
        if numbers != sorted(set(numbers)):
            raise ValueError("watches are not ascending")


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return file.link == _NAME


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`: names are looked for while the target runs; what is new, once more."""
    if not table.running and table.is_unchanged(file):
        return None
    inodes = [_inode_of(watch) for watch in file.info.inotify_watches]
    paths = find_paths(inodes)
    lost = next((inode for inode in inodes if inode not in paths), None)
    if lost is None:
        return None
    return Problem(
        f"is an inotify that watches inode {lost.number} of device"
        f" {lost.dev_major}:{lost.dev_minor}, which is deleted or whose name cannot be found"
    )


def _inode_of(watch: InotifyWatch) -> Inode:
    return Inode(*watch.dev, watch.inode, watch.handle_type, watch.handle)


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> InotifyRecord:
    """See `Kind.capture`: names come when the target runs again."""
    with table.borrow(file) as fd:
        unread_bytes = count_unread_bytes(fd)
    watches = sorted(file.info.inotify_watches, key=lambda watch: watch.wd)
    return InotifyRecord(
        tuple(WatchRecord(w.wd, w.mask, _inode_of(w), "", is_link=False) for w in watches),
        unread_bytes,
    )


def settle(record: InotifyRecord) -> InotifyRecord:
    """See `Kind.settle`."""
    paths = find_paths(watch.inode for watch in record.watches)
    return attrs.evolve(
        record,
        watches=tuple(
            attrs.evolve(watch, path=path, is_link=os.path.islink(path))
            for watch in record.watches
            for path in (paths.get(watch.inode, ""),)
        ),
    )


def check_files(record: InotifyRecord, _flags: int, _options: RestoreOptions) -> Iterator[Problem]:
    """See `Kind.check_files`."""
    for watch in record.watches:
        if not watch.path:
            yield Problem(
                f"watched inode {watch.inode.number}, which was renamed or removed while it was"
                " captured"
            )
            continue
        try:
            now = os.lstat(watch.path) if watch.is_link else os.stat(watch.path)
        except OSError as error:
            text = f"watched {watch.path}, which cannot be opened ({error.strerror})"
            yield Problem(text, "put the file back")
            continue
        if watch.is_link and not stat.S_ISLNK(now.st_mode):
            text = f"watched {watch.path}, which is no symbolic link any more"
            yield Problem(text, "put the file back")


def open_again(_record: InotifyRecord, flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    fd = inotify_init()
    set_status_flags(fd, flags)
    return fd


def attach(record: InotifyRecord, fd: RemoteFd, attaching: Attaching) -> Restore:
    """See `Kind.attach`: the work is ours, by a descriptor of the process's description."""
    yield []
    if fd in attaching.replaced_fds:
        return
    with _taken(attaching.rebuilt.pid, fd) as ours, _scratch_file() as scratch:
        undisturbed = _add_watches(ours, record.watches, scratch)
        if record.unread_bytes or not undisturbed:
            _overflow(ours, scratch)
    if record.unread_bytes:
        attaching.rebuilt.warn(
            f"fd {fd}: {record.unread_bytes} bytes of inotify events had not been read; the"
            " process is told of an overflow (IN_Q_OVERFLOW) instead"
        )


@contextlib.contextmanager
def _taken(pid: Pid, fd: RemoteFd) -> Iterator[Fd]:
    pidfd = pidfd_open(pid)
    try:
        ours = pidfd_getfd(pidfd, fd, pid=pid)
    finally:
        os.close(pidfd)
    try:
        yield ours
    finally:
        os.close(ours)


@contextlib.contextmanager
def _scratch_file() -> Iterator[Fd]:
    """Make a file without a name, of which inotify tells."""
    made = os.memfd_create("ckpt-inotify", os.MFD_CLOEXEC)
    try:
        # What memfd_create itself has opened tells nobody anything (Linux 6.14).
        fd = os.open(f"/proc/self/fd/{made}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(made)
    try:
        yield Fd(fd)
    finally:
        os.close(fd)


def _add_watches(fd: Fd, watches: Iterable[WatchRecord], scratch: Fd) -> bool:
    """Add all watches, each under its number; tell whether no event got lost meanwhile.

    Raises:
        RestoreFailed: one cannot be added.
    """
    next_number, undisturbed = 1, True
    for watch in watches:
        if watch.watch > next_number:
            undisturbed &= _use_up(fd, range(next_number, watch.watch), scratch)
        mask = watch.mask | IN_MASK_CREATE | (IN_DONT_FOLLOW if watch.is_link else 0)
        try:
            number = inotify_add_watch(fd, watch.path, mask)
        except OSError as error:
            raise RestoreFailed(f"watching {watch.path}", _explain(error)) from error
        if number != watch.watch:
            raise RestoreFailed(f"watching {watch.path}", f"got {number}, not {watch.watch}")
        next_number = number + 1
    return undisturbed


def _explain(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "no more watches are allowed here: raise fs.inotify.max_user_watches"
    if error.errno == errno.EEXIST:
        return "another watched name leads to the same file now"
    return error.strerror or str(error)


def _use_up(fd: Fd, numbers: range, scratch: Fd) -> bool:
    """Give numbers to watches that are removed at once; tell whether no other event got lost."""
    path = bytearray(f"/proc/self/fd/{scratch}\0".encode())
    address, _ = writable_address(path)
    undisturbed = True
    for start in range(numbers.start, numbers.stop, _AT_ONCE):
        burst = Burst()
        part = range(start, min(start + _AT_ONCE, numbers.stop))
        for number in part:
            burst.add(NR.inotify_add_watch, fd, address, IN_DELETE_SELF)
            burst.add(NR.inotify_rm_watch, fd, number)
        results = burst.run()
        if list(results[::2]) != list(part):
            raise RestoreFailed("adding watches", f"got {results[0]}, not {start}")
        undisturbed &= _drop_ignored(fd)
    return undisturbed


def _drop_ignored(fd: Fd) -> bool:
    """Empty the queue; tell whether it held only the ends of our own watches."""
    undisturbed = True
    while count_unread_bytes(fd):
        raw = os.read(fd, _CHUNK_BYTES)
        at = 0
        while at < len(raw):
            _, mask, _, name_bytes = EVENT_HEADER.unpack_from(raw, at)
            undisturbed &= mask == IN_IGNORED
            at += EVENT_HEADER.size + name_bytes
    return undisturbed


def _overflow(fd: Fd, scratch: Fd) -> None:
    """Leave an overflow in the queue, and before it nothing."""
    watch = inotify_add_watch(fd, f"/proc/self/fd/{scratch}", IN_MODIFY | IN_ACCESS)
    byte = bytearray(b"x")
    written, read = readable_address(byte)[0], writable_address(byte)[0]
    burst = Burst()
    for _ in range(_AT_ONCE):
        # In turn: two equal events one after the other are one.
        burst.add(NR.pwrite64, scratch, written, 1, 0)
        burst.add(NR.pread64, scratch, read, 1, 0)
    for _ in range(read_max_queued_events() // len(burst) + 1):
        burst.run()
    inotify_rm_watch(fd, watch)
    # The overflow is the last for now. Once we read, others may come behind it.
    left = count_unread_bytes(fd) - EVENT_HEADER.size
    while left > 0:
        left -= len(os.read(fd, min(left, _CHUNK_BYTES)))


INOTIFY = Kind(
    "inotify",
    InotifyRecord,
    matches=matches,
    problem=problem,
    capture=capture,
    settle=settle,
    check_files=check_files,
    open=open_again,
    attach=attach,
)
