"""Regular files, and whatever is open by its name only (O_PATH).

Kernel: open(2), lseek(2), /proc/PID/fdinfo for offset and flags, stat(2) for the identity.

A file that any description of the process may write changes by the process's own hand: it may have
grown since, and is taken as it is, said aloud; what it must not be is shorter than an offset in
use. Any other file must be the same (`file_identity`). Nothing is copied into the image, but what
no name leads to: deleted files and memfds (`content.py`), which the restorer has made.

Refused before the target is stopped: files whose name was given to another file, files that have
another name than the one they were opened by, files of /proc/PID. Not seen: dnotify requests, and
that another process shares the offset.
"""

import fcntl
import os
import stat
from collections.abc import Iterator

import attrs

from ckpt.process.remote import Reply
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.content import OWN_LINKS, identify_shown
from ckpt.resources.file_identity import FileIdentity, describe_change, with_build_id
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, duplicate, open_at, set_status_flags
from ckpt.resources.files.open_file import OpenFile, Problem, is_made_by_the_kernel, path_problem
from ckpt.units import Fd

_LASTING = os.O_ACCMODE | os.O_TMPFILE
_OF_THE_NAME = os.O_NOFOLLOW | os.O_TMPFILE
"""Flags about how the file was found. The kernel keeps them; a link in /proc does not take them."""


@attrs.frozen(slots=True, repr=False)
class RegularRecord:
    """A file, and where in it the description stands."""

    file: FileIdentity
    offset_bytes: int
    written: bool
    """Some description of the process may write it."""
    by_name: bool
    """Only its name counts: O_PATH, or a file that the kernel makes up as it is read."""


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    mode = file.status.st_mode
    if file.path_only:
        return not stat.S_ISDIR(mode)
    return stat.S_ISREG(mode)


def problem(file: OpenFile, _table: FdTable) -> Problem | None:
    """See `Kind.problem`; whether a content can travel, `content.py` says."""
    return None if identify_shown(file.link, file.status).content else path_problem(file)


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> RegularRecord:
    """See `Kind.capture`."""
    written = table.is_written(file)
    by_name = file.path_only or is_made_by_the_kernel(file.link)
    return RegularRecord(
        file=identify_shown(file.link, file.status),
        offset_bytes=file.info.pos,
        written=written,
        by_name=by_name,
    )


def settle(record: RegularRecord) -> RegularRecord:
    """See `Kind.settle`: a program that nobody writes may come from another place later."""
    if record.written or record.by_name:
        return record
    return attrs.evolve(record, file=with_build_id(record.file))


def check_files(record: RegularRecord, flags: int, options: RestoreOptions) -> Iterator[Problem]:
    """See `Kind.check_files`."""
    path = record.file.path
    if options.content_of(record.file.content, path) is not None:
        return
    if record.file.content:
        yield Problem("is deleted, and the image does not hold its content")
        return
    try:
        now = os.lstat(path) if flags & os.O_NOFOLLOW else os.stat(path)
    except OSError as error:
        yield Problem(f"cannot be opened ({error.strerror})", "put the file back")
        return
    if record.by_name:
        return
    if not stat.S_ISREG(now.st_mode):
        yield Problem("is no regular file any more", "put the file back")
    elif path not in options.allow_changed:
        change = _change_of(record, now, options)
        if change:
            yield Problem(change, f"put the file back, or --allow-changed {path}")


def _change_of(record: RegularRecord, now: os.stat_result, options: RestoreOptions) -> str:
    """Return what makes the file unusable; empty if nothing does. Warn of lesser changes."""
    file = record.file
    if not record.written:
        return describe_change(file)
    if now.st_size < min(record.offset_bytes, file.size_bytes):
        return f"has {now.st_size} bytes now, and the process is at byte {record.offset_bytes}"
    if now.st_size != file.size_bytes:
        options.warn(
            f"{file.path} has {now.st_size} bytes now, had {file.size_bytes} at the checkpoint:"
            " the process goes on at its old offset"
        )
    elif now.st_mtime_ns != file.mtime_ns:
        options.warn(f"{file.path} was written to since the checkpoint, and is taken as it is")
    return ""


def open_again(record: RegularRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    made = opening.options.content_of(record.file.content, record.file.path)
    if made is None:
        return open_at(record.file.path, flags, record.offset_bytes)
    flags_now = flags
    if made.startswith(OWN_LINKS):
        fd = Fd(int(made.removeprefix(OWN_LINKS)))
        if flags & os.O_TMPFILE == os.O_TMPFILE and _lasting(fd) == flags & _LASTING:
            # It can be had by making the file only, and so it was.
            fd = duplicate(fd)
            set_status_flags(fd, flags)
            os.lseek(fd, record.offset_bytes, os.SEEK_SET)
            return fd
        flags_now &= ~_OF_THE_NAME
    return open_at(made, flags_now, record.offset_bytes)


def _lasting(fd: Fd) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & _LASTING


REGULAR = Kind(
    "regular",
    RegularRecord,
    matches=matches,
    problem=problem,
    reads_nothing=True,
    capture=capture,
    settle=settle,
    check_files=check_files,
    open=open_again,
)
