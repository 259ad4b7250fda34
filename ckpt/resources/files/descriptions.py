"""What an image holds of descriptors and of the open file descriptions behind them.

    process 7   fds             descriptions           process 8   fds
                0 ──────────> 0 external, stdin  <──────────────── 0
                1 ──────────> 1 regular, /var/log/x
                2 ─────────┘                            1 and 2 share offset and flags
                7 cloexec ──> 2 pipe 4711, read end
                                3 pipe 4711, write end <────────── 1   in the record of process 8

Each description is in the record of the first process that has it open, under a number of its own
in the whole tree.
"""

from collections.abc import Mapping
from typing import Any

import attrs

from ckpt.resources.files.external import ExternalRecord
from ckpt.resources.files.kind import AnyKind
from ckpt.resources.files.kinds import BY_NAME
from ckpt.resources.files.locks import LockRecord
from ckpt.resources.files.outside import OutsideRecord
from ckpt.resources.plain import strict, structure

_MAX_FD = 2**31 - 1


@attrs.frozen(slots=True, repr=False)
class Description:
    """One open file description."""

    id: int
    """Its number in the tree."""
    kind: str
    flags: int
    """Access mode and status flags of open(2)."""
    record: Any
    """The record of its kind; given as plain values (from an image) it is made one."""

    def __attrs_post_init__(self) -> None:
        """Refuse an unknown kind; turn plain values into the kind's record."""
        if self.kind not in BY_NAME:
            raise ValueError(f"unknown kind of file {self.kind!r}")
        record = BY_NAME[self.kind].record
        if not isinstance(self.record, record):
            object.__setattr__(self, "record", structure(strict(self.record, dict), record))

    @property
    def behaviour(self) -> AnyKind:
        """What can be done with it."""
        return BY_NAME[self.kind]

    @property
    def name(self) -> str:
        """What a user calls it."""
        record = self.record
        if isinstance(record, ExternalRecord):
            return record.was
        if isinstance(record, OutsideRecord):
            return record.key
        file = getattr(record, "file", None)
        return str(file.path if file else getattr(record, "path", self.kind))

    @property
    def shown(self) -> str:
        """What it is, as lists of open files show it."""
        return self.behaviour.describe(self.record) or self.name


@attrs.frozen(slots=True, repr=False)
class FdRecord:
    """One descriptor."""

    fd: int
    description: int
    """`Description.id`; maybe of the record of another process, which came first."""
    close_on_exec: bool


@attrs.frozen(slots=True, repr=False)
class FdLocks:
    """The locks that are held by a process through one descriptor, or by its description."""

    fd: int
    locks: tuple[LockRecord, ...]


@attrs.frozen(slots=True, repr=False)
class FilesRecord:
    """All that a process has open."""

    descriptions: tuple[Description, ...]
    """Those that no process before it has open."""
    fds: tuple[FdRecord, ...]
    """Ascending."""
    locks: tuple[FdLocks, ...] = ()

    def __attrs_post_init__(self) -> None:
        """Refuse numbers that cannot be."""
        numbers = [entry.fd for entry in self.fds]
        if numbers != sorted(set(numbers)) or (numbers and not 0 <= numbers[0] <= numbers[-1]):
            raise ValueError("descriptors are not ascending")
        if self.highest_fd > _MAX_FD:
            raise ValueError(f"descriptor {self.highest_fd} cannot be")
        used = {entry.description for entry in self.fds}
        own = [description.id for description in self.descriptions]
        if len(set(own)) < len(own) or not used.issuperset(own):
            raise ValueError("descriptors and descriptions do not belong together")
        if not {one.fd for one in self.locks} <= set(numbers):
            raise ValueError("locks are held by a descriptor that there is not")

    @property
    def highest_fd(self) -> int:
        """The highest descriptor; -1 if there is none."""
        return self.fds[-1].fd if self.fds else -1

    @property
    def external_keys(self) -> list[str]:
        """What a restore asks for, see `outside`."""
        records = (one.record for one in self.descriptions)
        return [one.key for one in records if isinstance(one, OutsideRecord)]

    def leading_to(self, paths: Mapping[int, str]) -> list[int]:
        """Return which descriptors have the regular file of their path; of one open file the first.

        Args:
            paths: of some descriptors, in the order in which they count as the first.
        """
        names = {one.id: one.name for one in self.descriptions if one.kind == "regular"}
        place = {int(entry.fd): entry.description for entry in self.fds}
        found: dict[int, int] = {}
        for fd, path in paths.items():
            description = place.get(fd)
            if description is not None and names.get(description) == path:
                found.setdefault(description, fd)
        return list(found.values())

    def first_fds(self) -> dict[int, int]:
        """Return the lowest descriptor of each description, by its id."""
        return {entry.description: entry.fd for entry in reversed(self.fds)}
