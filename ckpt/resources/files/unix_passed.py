"""Descriptors in flight: sent over a unix socket (SCM_RIGHTS), closed by who sent them.

Such a file is captured here as any other, and opened again for nothing but to be sent.

Kernel: unix(7) SCM_RIGHTS, kcmp(2). A look into the queue gives us descriptors of our own.

It can be a regular file, a directory, a character device or an eventfd. Everything else belongs to
something that is elsewhere, and is refused; so is what a process of the tree has open, too: the
message shares it with that process.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.files.fd_table import FdTable, FdTables
from ckpt.resources.files.open_file import Problem
from ckpt.resources.plain import strict, structure
from ckpt.units import Fd, Pid, RemoteFd

if TYPE_CHECKING:
    from ckpt.resources.files.kind import AnyKind

_ALONE = frozenset({"regular", "directory", "chardev", "eventfd"})


@attrs.frozen(slots=True, repr=False)
class Passed:
    """One descriptor in flight."""

    kind: str
    flags: int
    """Access mode and status flags of open(2)."""
    record: Any
    """The record of its kind; given as plain values (from an image) it is made one."""

    def __attrs_post_init__(self) -> None:
        """Refuse what cannot be in flight alone; turn plain values into the kind's record."""
        if self.kind not in _ALONE:
            raise ValueError(f"no {self.kind!r} can be in flight alone")
        record = self.behaviour.record
        if not isinstance(self.record, record):
            object.__setattr__(self, "record", structure(strict(self.record, dict), record))

    @property
    def behaviour(self) -> "AnyKind":
        """What can be done with it."""
        return _kind_named(self.kind)


def _kind_named(name: str) -> "AnyKind":
    # A message may hold any kind of file, and its socket is one: the list of all knows this module.
    from ckpt.resources.files.kinds import BY_NAME

    return BY_NAME[name]


class NotPassable(Exception):
    """A descriptor in flight that cannot be captured; with the reason as its text."""


def capture(fd: Fd, table: FdTable) -> Passed:
    """Return what a descriptor is that a look into a queue has given us.

    Raises:
        NotPassable: it cannot be captured.
    """
    status, ours = os.fstat(fd), Pid(os.getpid())
    for file in table.files:
        pid = file.pid
        if os.path.samestat(status, file.status) and (
            kcmp(ours, pid, KcmpType.FILE, fd, file.fd) is Ordering.EQUAL
        ):
            raise NotPassable(f"process {pid} has open too, as fd {file.fd}")
    return _capture_alone(fd, ours)


def _capture_alone(fd: Fd, ours: Pid) -> Passed:
    """Capture it as if we were the target."""
    from ckpt.resources.files.kinds import classify

    tables = FdTables([ours])
    try:
        own = FdTable(tables, ours)
        file = own.by_fd[RemoteFd(fd)]
        kind, problem = classify(file, own)
        if kind is None or kind.name not in _ALONE:
            text = problem.text if problem else f"is of a kind ({file.link}) that is tied to others"
            raise NotPassable(text)
        return Passed(kind.name, file.flags, kind.capture(file, own, []))
    finally:
        tables.tree.forget()


def settle(passed: Passed) -> Passed:
    """Complete the record after the thaw."""
    return attrs.evolve(passed, record=passed.behaviour.settle(passed.record))


def check_files(passed: Passed, options: RestoreOptions) -> Iterator[Problem]:
    """Tell what is missing or changed."""
    yield from passed.behaviour.check_files(passed.record, passed.flags, options)


def open_again(passed: Passed, opening: "Opening") -> Fd:
    """Return a descriptor to send, ours to close.

    Raises:
        OSError: it cannot be opened.
    """
    return passed.behaviour.open(passed.record, passed.flags, opening)
