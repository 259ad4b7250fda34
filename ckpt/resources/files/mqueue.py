"""POSIX message queues.

Kernel: mq_overview(7), mq_open(2), mq_getsetattr(2); a queue's file shows who waits for a
notification (NOTIFY_PID, ipc/mqueue.c); /proc/PID/fd/N opens it once more, whatever its name.

A queue with a name in ckpt's IPC namespace is like a file: it stays on the host with its messages,
and is opened again by that name. The kernel shows a message only to whom it gives it, so none is
read, and none travels: a queue that has none is made anew where it is missing, one that had some is
named as missing.

Refused before the target is stopped: messages in a queue that has no name, or that is in an IPC
namespace of the tree's own (both end with the tree); a queue of which somebody is to be notified
(mq_notify), since the kernel does not show what with.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from functools import partial

import attrs

from ckpt.kernel.mqueue import (
    FILE_BYTES,
    Attributes,
    is_mqueue,
    mq_getattr,
    mq_open,
    mq_unlink,
    read_notified,
)
from ckpt.kernel.namespaces import read_namespace
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, flags_for_open, set_status_flags
from ckpt.resources.files.open_file import O_LARGEFILE, OpenFile, Problem
from ckpt.units import Fd, Pid

_DELETED = " (deleted)"
_MAX_NAME_BYTES = 255


@attrs.frozen(slots=True, repr=False)
class MqueueRecord:
    """A queue."""

    name: str
    """Without the slash; if it is unlinked, what it was called."""
    inode: int
    """Which queue of the tree it is."""
    unlinked: bool
    max_messages: int
    max_message_bytes: int
    n_messages: int
    mode: int
    """Permission bits."""
    uid: int
    gid: int

    def __attrs_post_init__(self) -> None:
        """Refuse a name that no queue has."""
        if not 0 < len(os.fsencode(self.name)) <= _MAX_NAME_BYTES or set("/\0") & set(self.name):
            raise ValueError(f"{self.name!r} is no name of a message queue")

    @property
    def attributes(self) -> Attributes:
        """What it may hold, and holds."""
        return Attributes(self.max_messages, self.max_message_bytes, self.n_messages)


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`: what all queues look like, and few files."""
    return (
        stat.S_ISREG(file.status.st_mode)
        and file.status.st_size == FILE_BYTES
        and not file.status.st_blocks
        and file.link.startswith("/")
        and not file.path_only
    )


def is_for(file: OpenFile, table: FdTable) -> bool:
    """See `Kind.is_for`."""
    try:
        return is_mqueue(_path(file, table))
    except OSError:
        return False


def _path(file: OpenFile, table: FdTable) -> str:
    return f"/proc/{table.pid}/fd/{file.fd}"


def _is_unlinked(file: OpenFile) -> bool:
    return file.status.st_nlink == 0


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    try:
        fd = Fd(os.open(_path(file, table), os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return Problem(f"is a message queue that cannot be examined ({error.strerror})")
    try:
        n_messages, notified = mq_getattr(fd).n_messages, read_notified(fd)
    finally:
        os.close(fd)
    if notified:
        return Problem(
            f"is a message queue that is to notify process {notified} (mq_notify), which is not"
            " supported"
        )
    if n_messages and (_is_unlinked(file) or _is_elsewhere(table.pid)):
        return Problem(
            f"is a message queue with {n_messages} messages that ends with the process (the kernel"
            " shows messages to nobody else)",
            "dump it when they have been received",
        )
    return None


def _is_elsewhere(pid: Pid) -> bool:
    """Tell whether a process is in another IPC namespace than we are."""
    try:
        return read_namespace(pid, "ipc") != read_namespace(Pid(os.getpid()), "ipc")
    except OSError:
        return False


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> MqueueRecord:
    """See `Kind.capture`."""
    fd = Fd(os.open(_path(file, table), os.O_RDONLY | os.O_CLOEXEC))
    try:
        attributes = mq_getattr(fd)
    finally:
        os.close(fd)
    return MqueueRecord(
        name=file.link.removesuffix(_DELETED).removeprefix("/"),
        inode=file.status.st_ino,
        unlinked=_is_unlinked(file),
        max_messages=attributes.max_messages,
        max_message_bytes=attributes.max_message_bytes,
        n_messages=attributes.n_messages,
        mode=stat.S_IMODE(file.status.st_mode),
        uid=file.status.st_uid,
        gid=file.status.st_gid,
    )


def check_files(record: MqueueRecord, _flags: int, options: RestoreOptions) -> Iterator[Problem]:
    """See `Kind.check_files`."""
    if record.unlinked:
        return
    try:
        fd = mq_open(record.name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if record.n_messages:
            yield Problem(f"is not there any more, and had {record.n_messages} messages")
        return
    except OSError as error:
        yield Problem(f"cannot be opened ({error.strerror})")
        return
    try:
        now = mq_getattr(fd)
    finally:
        os.close(fd)
    if attrs.evolve(now, n_messages=record.n_messages) != record.attributes:
        yield Problem("is another queue now: it may hold other messages than before")
    elif now.n_messages != record.n_messages:
        options.warn(
            f"message queue /{record.name} has {now.n_messages} messages now, had"
            f" {record.n_messages} at the checkpoint"
        )


def open_again(record: MqueueRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    key = (MQUEUE.name, record.inode)
    if key not in opening.made:
        made = opening.made[key] = _open_or_make(record, opening)
        opening.stack.callback(os.close, made)
        if record.unlinked:
            # All descriptions are opened by the name.
            opening.stack.callback(mq_unlink, record.name)
    if flags & O_LARGEFILE:
        # Was opened by a path, as mq_open(2) never does.
        return Fd(os.open(f"/proc/self/fd/{opening.made[key]}", flags_for_open(flags)))
    fd = mq_open(record.name, flags_for_open(flags))
    set_status_flags(fd, flags)
    return fd


def _open_or_make(record: MqueueRecord, opening: Opening) -> Fd:
    if not record.unlinked:
        try:
            return mq_open(record.name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = mq_open(record.name, flags, 0o600, record.attributes)
    except FileExistsError:
        # The name of an unlinked queue may be another's by now.
        raise OSError(errno.EEXIST, f"message queue /{record.name} is another one's") from None
    if not record.unlinked:
        opening.at_failure.append(partial(_remove, record.name))
    os.fchown(fd, record.uid, record.gid)
    os.fchmod(fd, record.mode)
    return fd


def _remove(name: str) -> None:
    with contextlib.suppress(OSError):
        mq_unlink(name)


MQUEUE = Kind(
    "mqueue",
    MqueueRecord,
    matches=matches,
    is_for=is_for,
    problem=problem,
    capture=capture,
    check_files=check_files,
    open=open_again,
)
