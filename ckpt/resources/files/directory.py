"""Open directories.

Kernel: open(2), getdents64(2), lseek(2). The offset of a directory is a cookie of its file system,
good for the same directory of the same file system: after a move to another host a listing that
was under way may repeat or miss entries.

A deleted directory comes back empty, as it is, and deleted (`content.py`).

Refused before the target is stopped: directories that are moved away, or of /proc/PID.
"""

import os
import stat
from collections.abc import Iterator

import attrs

from ckpt.process.remote import Reply
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.content import identify_shown
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, open_at
from ckpt.resources.files.open_file import OpenFile, Problem, path_problem
from ckpt.units import Fd


@attrs.frozen(slots=True, repr=False)
class DirectoryRecord:
    """A directory, and how far its listing is."""

    path: str
    offset: int
    """A cookie of the file system."""
    content: str = ""
    """Its key among the contents, if it is deleted."""


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return stat.S_ISDIR(file.status.st_mode)


def problem(file: OpenFile, _table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    return None if identify_shown(file.link, file.status).content else path_problem(file)


def capture(file: OpenFile, _table: FdTable, _replies: list[Reply]) -> DirectoryRecord:
    """See `Kind.capture`."""
    identity = identify_shown(file.link, file.status)
    return DirectoryRecord(identity.path, file.info.pos, identity.content)


def check_files(record: DirectoryRecord, _flags: int, options: RestoreOptions) -> Iterator[Problem]:
    """See `Kind.check_files`."""
    if record.content and options.content_of(record.content, "") is not None:
        return
    problem = directory_problem(record.path)
    if problem:
        yield Problem(problem, "make the directory")


def directory_problem(path: str) -> str:
    """Return why the path cannot stand for the directory that it named; empty if it can."""
    try:
        status = os.stat(path)
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    return "" if stat.S_ISDIR(status.st_mode) else "is no directory any more"


def open_again(record: DirectoryRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    content = record.content
    path, offset = (
        (opening.options.contents[content], 0) if content else (record.path, record.offset)
    )
    if flags & (os.O_PATH | os.O_DIRECTORY):
        return open_at(path, flags | os.O_DIRECTORY, offset)
    # It was opened without that flag, which F_GETFL tells; here it sees to it that it is one.
    found = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_at(f"/proc/self/fd/{found}", flags, offset)
    finally:
        os.close(found)


DIRECTORY = Kind(
    "directory",
    DirectoryRecord,
    matches=matches,
    problem=problem,
    reads_nothing=True,
    capture=capture,
    check_files=check_files,
    open=open_again,
)
