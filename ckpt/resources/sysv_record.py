"""What an image holds of System V IPC; see `sysv.py`."""

import attrs

from ckpt.kernel.sysvipc import Permissions

MAX_DATA_BYTES = 16 << 20
"""How much of a segment may be other than zero."""
SETTINGS = (
    *("sem", "shmmax", "shmall", "shmmni", "shm_rmid_forced"),
    *("msgmax", "msgmnb", "msgmni"),
)
"""Files below /proc/sys/kernel that are of an IPC namespace."""
_MAX_INT, _MAX_UINT = 0x7FFF_FFFF, 0xFFFF_FFFF
_MAX_SEMAPHORE = 32767


@attrs.frozen(slots=True, repr=False)
class DataRecord:
    """Bytes of a segment that are not all zero."""

    offset_bytes: int
    len_bytes: int
    packed: bytes
    """By zlib."""


@attrs.frozen(slots=True, repr=False)
class SegmentRecord:
    """A shared memory segment."""

    id: int
    permissions: Permissions
    first_key: int
    """The key that it was made with, which its mappings show even when it is removed."""
    size_bytes: int
    data: tuple[DataRecord, ...]

    def __attrs_post_init__(self) -> None:
        """Refuse data that is not within the segment, or is more than we would have taken."""
        ends = [one.offset_bytes + one.len_bytes for one in self.data]
        _check(self.id, self.permissions)
        if any(one.offset_bytes < 0 or one.len_bytes < 1 for one in self.data):
            raise ValueError("data of a segment lies before it")
        if not 0 <= self.first_key <= _MAX_UINT:
            raise ValueError(f"{self.first_key} is no key")
        if max(ends, default=0) > self.size_bytes:
            raise ValueError("data of a segment lies behind its end")
        if sum(one.len_bytes for one in self.data) > MAX_DATA_BYTES:
            raise ValueError("a segment has more data than may be")


@attrs.frozen(slots=True, repr=False)
class AttachmentRecord:
    """A mapping of a segment, or of a part of one."""

    id: int
    start: int
    end: int
    offset_bytes: int
    """In the segment."""
    prot: int
    """PROT_* bits."""
    writable: bool
    """It may be made writable: it was not attached with SHM_RDONLY."""
    locked: bool
    """By mlock(2)."""

    def __attrs_post_init__(self) -> None:
        """Refuse what is no mapping."""
        if not 0 <= self.start < self.end or self.offset_bytes < 0 or self.id < 0:
            raise ValueError("a segment is attached to no place")


@attrs.frozen(slots=True, repr=False)
class SemaphoresRecord:
    """A set of semaphores."""

    id: int
    permissions: Permissions
    values: tuple[int, ...]

    def __attrs_post_init__(self) -> None:
        """Refuse values that no semaphore has."""
        _check(self.id, self.permissions)
        if not all(0 <= value <= _MAX_SEMAPHORE for value in self.values):
            raise ValueError("a semaphore has a value that cannot be")


@attrs.frozen(slots=True, repr=False)
class MessageRecord:
    """A message."""

    kind: int
    """Its type."""
    text: bytes

    def __attrs_post_init__(self) -> None:
        """Refuse what no message has."""
        if not 1 <= self.kind < 1 << 63:
            raise ValueError(f"{self.kind} is no type of a message")


@attrs.frozen(slots=True, repr=False)
class QueueRecord:
    """A message queue."""

    id: int
    permissions: Permissions
    limit_bytes: int
    messages: tuple[MessageRecord, ...]

    def __attrs_post_init__(self) -> None:
        """Refuse what no queue has."""
        _check(self.id, self.permissions)
        if not 0 <= self.limit_bytes < 1 << 63:
            raise ValueError(f"no queue holds {self.limit_bytes} bytes")


@attrs.frozen(slots=True, repr=False)
class SysvRecord:
    """What the process has attached; and what it is the first of its tree to have attached.

    The root has all that is in a namespace of its own.
    """

    attached: tuple[AttachmentRecord, ...]
    segments: tuple[SegmentRecord, ...]
    semaphores: tuple[SemaphoresRecord, ...]
    queues: tuple[QueueRecord, ...]
    settings: tuple[tuple[str, str], ...]
    """Name below /proc/sys/kernel, value; of a namespace of its own."""

    def __attrs_post_init__(self) -> None:
        """Refuse to write anything but the settings that are known."""
        if any(name not in SETTINGS or "\n" in value for name, value in self.settings):
            raise ValueError("a setting that is not known")


def _check(number: int, permissions: Permissions) -> None:
    """Refuse an id, an owner, a mode that no object has."""
    owners = (permissions.uid, permissions.gid)
    if not 0 <= number <= _MAX_INT or not -_MAX_INT - 1 <= permissions.key <= _MAX_INT:
        raise ValueError(f"{number} is no id, or {permissions.key} no key, of System V")
    if not all(0 <= owner <= _MAX_UINT for owner in owners) or permissions.mode & ~0o7777:
        raise ValueError("an object of System V is of nobody, or has no mode")
