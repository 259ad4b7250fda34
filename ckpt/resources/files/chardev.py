"""Character devices that keep nothing per open: null, zero, full, random, urandom.

Kernel: null(4), random(4), full(4); Documentation/admin-guide/devices.txt, major 1.

Every other device is refused before the target is stopped, terminals too, except as a standard
stream (`external`).
"""

import os
import stat
from collections.abc import Iterator

import attrs

from ckpt.process.remote import Reply
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, flags_for_open
from ckpt.resources.files.open_file import OpenFile, Problem, outside_problem, path_problem
from ckpt.units import Fd

_MEMORY_DEVICES = 1
_STATELESS = {3: "null", 5: "zero", 7: "full", 8: "random", 9: "urandom"}
_TERMINALS = frozenset({4, 5, *range(136, 144)})
"""Majors of virtual consoles and serial lines, /dev/tty and /dev/console, and pseudo-terminals."""
_PTMX = os.makedev(5, 2)


@attrs.frozen(slots=True, repr=False)
class ChardevRecord:
    """A device, by name and number."""

    path: str
    major: int
    minor: int


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return stat.S_ISCHR(file.status.st_mode)


def problem(file: OpenFile, _table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    device = file.status.st_rdev
    major, minor = os.major(device), os.minor(device)
    if major == _MEMORY_DEVICES and minor in _STATELESS:
        return path_problem(file)
    if device == _PTMX:
        return Problem("is the master of a pseudo-terminal, which is not supported yet")
    if major in _TERMINALS:
        return outside_problem(file.link, "is a terminal of the machine")
    return Problem(f"is the character device {major}:{minor}, which is not supported")


def capture(file: OpenFile, _table: FdTable, _replies: list[Reply]) -> ChardevRecord:
    """See `Kind.capture`."""
    device = file.status.st_rdev
    return ChardevRecord(file.link, os.major(device), os.minor(device))


def check_files(record: ChardevRecord, _flags: int, _options: RestoreOptions) -> Iterator[Problem]:
    """See `Kind.check_files`."""
    try:
        now = os.stat(record.path)
    except OSError as error:
        yield Problem(f"cannot be opened ({error.strerror})", "make the device")
        return
    wanted = os.makedev(record.major, record.minor)
    if not stat.S_ISCHR(now.st_mode) or now.st_rdev != wanted:
        yield Problem(f"is not the device {record.major}:{record.minor}", "make the device")


def open_again(record: ChardevRecord, flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    return Fd(os.open(record.path, flags_for_open(flags) | os.O_NOCTTY))


CHARDEV = Kind(
    "chardev",
    ChardevRecord,
    matches=matches,
    problem=problem,
    capture=capture,
    check_files=check_files,
    open=open_again,
)
