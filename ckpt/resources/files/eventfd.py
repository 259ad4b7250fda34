"""Event counters.

Kernel: eventfd(2); the count is in fdinfo, the semaphore mode only from Linux 6.5 on. On older
kernels it is found out by what a read leaves, in one batch that ends with the old count, runs to
its end even if we are killed, and can be noticed only as an additional wake-up.

There a counter above `_MAX_PROBED` is taken for no semaphore.
"""

import os
import struct

import attrs

from ckpt.kernel.arch import NR
from ckpt.process.remote import Call, In, Reply, call
from ckpt.resources.base import Opening
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, set_status_flags
from ckpt.resources.files.open_file import OpenFile
from ckpt.units import Fd, RemoteFd

_MAX_COUNT = 2**64 - 1
_MAX_INITIAL = 2**32 - 1
_MAX_PROBED = 256
_RWF_NOWAIT = 8
_AT_POSITION = 2**64 - 1
"""-1 for preadv2: use (and, for an eventfd, ignore) the file's own position."""


@attrs.frozen(slots=True, repr=False)
class EventfdRecord:
    """A counter."""

    count: int
    semaphore: bool

    def __attrs_post_init__(self) -> None:
        """Refuse what is no counter of the kernel's."""
        if not 0 <= self.count <= _MAX_COUNT:
            raise ValueError(f"an eventfd cannot count to {self.count}")


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return file.info.eventfd is not None


def ask(file: OpenFile) -> list[Call]:
    """See `Kind.ask`."""
    eventfd = file.info.eventfd
    assert eventfd is not None
    if eventfd.semaphore is not None or eventfd.count > _MAX_PROBED:
        return []
    return plan_probe(file.fd, eventfd.count)


def plan_probe(fd: RemoteFd, count: int) -> list[Call]:
    """Return calls that tell whether a counter is a semaphore, and leave it at `count`.

    It is brought to at least two and read until it is certainly empty. The second read finds
    nothing if the first took all: then it is no semaphore.
    """
    enough = max(count, 2)
    read = call(NR.preadv2, fd, _iovec(), 1, _AT_POSITION, _AT_POSITION, _RWF_NOWAIT)
    calls = [_write(fd, enough - count)] if count < enough else []
    calls += [read] * enough
    return [*calls, _write(fd, count)] if count else calls


def read_probe(replies: list[Reply]) -> bool:
    """Tell from the replies to `plan_probe` whether it is a semaphore."""
    reads = [reply for reply in replies if reply.asked.nr is NR.preadv2]
    return len(reads) > 1 and reads[1].ok


def _iovec() -> In:
    return In(struct.pack("<QQ", 0, 8), ((0, bytes(8)),))


def _write(fd: RemoteFd, value: int) -> Call:
    return call(NR.write, fd, In(struct.pack("<Q", value)), 8)


def capture(file: OpenFile, _table: FdTable, replies: list[Reply]) -> EventfdRecord:
    """See `Kind.capture`."""
    eventfd = file.info.eventfd
    assert eventfd is not None
    semaphore = eventfd.semaphore
    return EventfdRecord(eventfd.count, read_probe(replies) if semaphore is None else semaphore)


def open_again(record: EventfdRecord, flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    mode = os.EFD_SEMAPHORE if record.semaphore else 0
    initial = record.count if record.count <= _MAX_INITIAL else 0
    fd = Fd(os.eventfd(initial, mode | os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    if initial != record.count:
        # One below the limit is all that a write can bring it to.
        os.eventfd_write(fd, min(record.count, _MAX_COUNT - 1))
    set_status_flags(fd, flags)
    return fd


EVENTFD = Kind(
    "eventfd",
    EventfdRecord,
    matches=matches,
    is_kept=True,
    ask=ask,
    capture=capture,
    open=open_again,
)
