"""What a kind of open file description offers to `table`: how to recognise, capture and make it.

A kind is one file of this folder with one `Kind` at its end, listed in `kinds.KINDS`. Its record is
an attrs class of plain fields.
"""

import fcntl
import os
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import attrs

from ckpt.process.pid_space import Numbers
from ckpt.process.remote import Call, Reply
from ckpt.resources.base import Opening, Rebuilt, Restore, RestoreOptions
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.units import Fd, RemoteFd

R = TypeVar("R")

_SETTABLE = os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT | os.O_NOATIME
_AFTERWARDS = 0o20000
"""O_ASYNC (FASYNC): needs its owner first, see `owners`."""


@attrs.frozen(slots=True, eq=False, repr=False)
class Attaching:
    """What a kind needs for its last touch, inside the restored process."""

    rebuilt: Rebuilt
    replaced_fds: frozenset[int]
    """Descriptors that are not what they were: standard streams of ours."""


def _always(_file: OpenFile, _table: FdTable) -> bool:
    return True


def _no_problem(_file: OpenFile, _table: FdTable) -> Problem | None:
    return None


def _as_it_is(record: R) -> R:
    return record


def _without_numbers(record: R, _numbers: Numbers) -> R:
    return record


def _nothing_to_ask(_file: OpenFile) -> list[Call]:
    return []


def _nothing_changed(_record: object, _flags: int, _options: RestoreOptions) -> Iterable[Problem]:
    return ()


def _nothing_to_expect(_record: object, _opening: Opening) -> None:
    return


def _only_its_name(_record: object) -> str:
    return ""


def _nothing_missing(_record: object) -> Iterable[Problem]:
    return ()


@attrs.frozen(slots=True, eq=False, repr=False)
class Kind(Generic[R]):
    """One kind of open file description."""

    name: str
    """Its key in the image."""
    record: type[R]
    matches: Callable[[OpenFile], bool]
    """Tells whether a description is of this kind, whatever may be wrong with it."""
    capture: Callable[[OpenFile, FdTable, list[Reply]], R]
    """Given the frozen process, and the replies to `ask`."""
    open: Callable[[R, int, Opening], Fd]
    """Makes it anew in the restorer from its record and the flags of open(2), or raises OSError."""
    is_for: Callable[[OpenFile, FdTable], bool] = _always
    """Tells apart what `matches` cannot (sockets of different families), by asking the object."""
    problem: Callable[[OpenFile, FdTable], Problem | None] = _no_problem
    """Tells why this one cannot be captured."""
    reads_nothing: bool = False
    """`problem` and `capture` look at what the table has, at nothing else: the first need not be
    asked again of what has not changed, the second can wait until the target runs again."""
    is_kept: bool = False
    """What was of this kind, and has not changed, still is: only `problem` is asked again."""
    ask: Callable[[OpenFile], list[Call]] = _nothing_to_ask
    """What only the process itself can find out."""
    settle: Callable[[R], R] = _as_it_is
    """Completes the record after the thaw."""
    renumber: Callable[[R, Numbers], R] = _without_numbers
    """See `Resource.renumber`."""
    check_files: Callable[[R, int, RestoreOptions], Iterable[Problem]] = _nothing_changed
    """Tells what is missing or changed, before anything is started; warns of lesser changes."""
    check_host: Callable[[R], Iterable[Problem]] = _nothing_missing
    """Tells what this host does not let us have."""
    expect: Callable[[R, Opening], None] = _nothing_to_expect
    """See `Resource.expect`."""
    describe: Callable[[R], str] = _only_its_name
    """Tells a user what it is where that is more than its name: which addresses, which pipe."""
    attach: Callable[[R, RemoteFd, Attaching], Restore] | None = None
    """Runs inside the process, once all descriptors have their numbers."""


AnyKind = Kind[Any]


def flags_for_open(flags: int) -> int:
    """Return the flags with which open(2) makes a description that has `flags`."""
    return (flags & ~_AFTERWARDS) | os.O_CLOEXEC


def open_at(path: str, flags: int, offset: int) -> Fd:
    """Open what is under `path` with the status flags `flags`, at an offset (a directory's cookie).

    Raises:
        OSError: it cannot be opened, or has no such offset; nothing is left open.
    """
    fd = Fd(os.open(path, flags_for_open(flags)))
    if not flags & os.O_PATH and offset:
        try:
            os.lseek(fd, offset, os.SEEK_SET)
        except OSError:
            os.close(fd)
            raise
    return fd


def set_status_flags(fd: Fd, flags: int) -> None:
    """Give a description, however it was made, those of `flags` that can be set later."""
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & _SETTABLE)


def duplicate(fd: int) -> Fd:
    """Return another descriptor on the same description, closed on exec."""
    return Fd(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
