"""Regular files whose name was removed after they were opened, and which have another one.

As when a log is linked to another name and removed under its own. The other name is looked for in
the directory of the old one; while the target runs, also in all directories near that, level by
level. The file stays where it is: a restore links the old name to it again, opens it by that and
removes it, so that the process sees it as before; if somebody else has the old name by then, it is
opened by the other one.

Kernel: link(2), stat(2), scandir.

Refused before the target is stopped: if no other name is found among the nearest 100,000 of that
file system; and mappings of such files (`mappings.py`).
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import attrs

from ckpt.kernel.procfs.mountinfo import read_mountinfo
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.file_identity import FileIdentity, identify, with_build_id, without_deleted
from ckpt.resources.files import regular
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.inode_path import iter_entries
from ckpt.resources.files.kind import Kind, open_at
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.resources.files.regular import RegularRecord
from ckpt.units import Fd, Pid

_MOST_ENTRIES = 10_000


@attrs.frozen(slots=True, repr=False)
class LinkedRecord:
    """A file under the name that it has, and the one that it was opened by."""

    file: FileIdentity
    offset_bytes: int
    written: bool
    opened_as: str

    @property
    def as_regular(self) -> RegularRecord:
        """What it is but for its other name."""
        return RegularRecord(self.file, self.offset_bytes, self.written, by_name=False)


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return (
        stat.S_ISREG(file.status.st_mode)
        and not file.path_only
        and file.status.st_nlink > 0
        and file.link.endswith(" (deleted)")
        and not os.path.lexists(file.link)
    )


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`: far away it is only looked for while the target runs."""
    if _other_name(file, table):
        return None
    if table.running:
        far = _search_nearby(file)
        if far:
            _found_far(table)[_key(file)] = far
            return None
    return Problem("is deleted, but has another name, which is nowhere near that")


_FOUND_FAR = "other names of files, in other directories"


def _found_far(table: FdTable) -> dict[tuple[int, int], str]:
    found: dict[tuple[int, int], str] = table.tree.notes.setdefault(_FOUND_FAR, {})
    return found


def _key(file: OpenFile) -> tuple[int, int]:
    return file.status.st_dev, file.status.st_ino


def _search_nearby(file: OpenFile) -> str:
    mounts = {mount.path for mount in read_mountinfo(Pid(os.getpid()))}
    for number, path in iter_entries(_iter_ancestors(file), mounts):
        if number == file.status.st_ino and _is_same(path, file):
            return path
    return ""


def _iter_ancestors(file: OpenFile) -> Iterator[str]:
    """Yield the directory that the file was in, and those above it in its file system."""
    for folder in Path(file.link).parents:
        with contextlib.suppress(FileNotFoundError):
            if folder.stat().st_dev != file.status.st_dev:
                return
            yield str(folder)


def _is_same(path: str, file: OpenFile) -> bool:
    try:
        return os.path.samestat(os.lstat(path), file.status)
    except OSError:
        return False


def _other_name(file: OpenFile, table: FdTable) -> str:
    far = _found_far(table).get(_key(file), "")
    if far and _is_same(far, file):
        return far
    folder = os.path.dirname(file.link)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in islice(entries, _MOST_ENTRIES):
            # The number in the entry is quick to have, and on some file systems another.
            if entry.inode() == file.status.st_ino and _is_same(entry.path, file):
                return entry.path
    return ""


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> LinkedRecord:
    """See `Kind.capture`."""
    path = _other_name(file, table)
    if not path:
        raise FileNotFoundError(f"the other name of {file.link} is gone")
    return LinkedRecord(
        file=identify(path, file.status),
        offset_bytes=file.info.pos,
        written=table.is_written(file),
        opened_as=without_deleted(file.link),
    )


def settle(record: LinkedRecord) -> LinkedRecord:
    """See `Kind.settle`."""
    return record if record.written else attrs.evolve(record, file=with_build_id(record.file))


def check_files(record: LinkedRecord, flags: int, options: RestoreOptions) -> Iterator[Problem]:
    """See `Kind.check_files`."""
    return regular.check_files(record.as_regular, flags, options)


def open_again(record: LinkedRecord, flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    try:
        os.link(record.file.path, record.opened_as)
    except OSError:
        # Taken, or a file system that has no links any more: the name is all that differs.
        return open_at(record.file.path, flags, record.offset_bytes)
    try:
        return open_at(record.opened_as, flags, record.offset_bytes)
    finally:
        os.unlink(record.opened_as)


LINKED = Kind(
    "linked",
    LinkedRecord,
    matches=matches,
    problem=problem,
    capture=capture,
    settle=settle,
    check_files=check_files,
    open=open_again,
)
