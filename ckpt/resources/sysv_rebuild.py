"""Makes objects of System V IPC anew, in the restorer, and attaches segments; see `sysv.py`."""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt.errors import Finding, NotPermitted, RestoreFailed
from ckpt.kernel import sysvipc
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features
from ckpt.kernel.libc import PAGE_SIZE
from ckpt.kernel.sysvipc import IPC_CREAT, IPC_EXCL, SHM_DEST, Listed
from ckpt.process.remote import Call, call
from ckpt.resources.base import Opened, Opening, Rebuilt, Restore, expect
from ckpt.resources.sysv_record import (
    AttachmentRecord,
    QueueRecord,
    SegmentRecord,
    SemaphoresRecord,
    SysvRecord,
)
from ckpt.resources.vmas import PROT_EXEC, PROT_READ, PROT_WRITE
from ckpt.units import RemoteAddr

SYSCTL = Path("/proc/sys/kernel")
_STEP = "making System V IPC anew"


def check_host(record: SysvRecord, _features: Features) -> Iterator[Finding]:
    """Name ids and keys that are in use here, by anything but what the tree has left behind."""
    here = sysvipc.read_sysvipc("shm") if record.segments else []
    by_key = {one.permissions.key: one for one in here if one.permissions.key}
    by_id = {one.id: one for one in here}
    for segment in record.segments:
        keyed = by_key.get(segment.permissions.key)
        other = by_id.get(segment.id)
        if keyed is not None and keyed.id != segment.id:
            problem = f"its key is that of segment {keyed.id} here"
        elif other is not None and not _is_left_behind(other, segment):
            problem = "somebody uses a segment of this id"
        else:
            continue
        yield Finding(f"shared memory segment {segment.id}", problem, "see ipcs -m")


def _is_left_behind(here: Listed, segment: SegmentRecord) -> bool:
    # Of one that has no key any more: a restore was killed between making and removing it.
    keys = (segment.permissions.key, segment.first_key)
    return (
        here.permissions.key in keys
        and here.fields["size"] == segment.size_bytes
        and here.fields["nattch"] == 0
    )


class _Segment:
    """A segment that we have made, and have attached; removed if the restore fails."""

    def __init__(self, record: SegmentRecord) -> None:
        """Make it, still empty."""
        self._record = record
        self._done = False
        _make_room(record)
        self._id = _made(
            "shm",
            record.id,
            lambda flags: _get_segment(record, flags),
            sysvipc.remove_segment,
        )
        self._address: RemoteAddr | None = None

    def fill(self) -> None:
        """Attach it, and give it its content, its owner and its mode."""
        address = self._address = sysvipc.shmat(self._id)
        if self._record.permissions.mode & SHM_DEST:
            # It goes with the last who has it attached, so nothing stays if we are killed; till
            # then it can still be attached by its id.
            sysvipc.remove_segment(self._id)
        for one in self._record.data:
            raw = zlib.decompressobj().decompress(one.packed, one.len_bytes)
            sysvipc.write_attached(address, one.offset_bytes, raw)
        sysvipc.set_segment(self._id, self._record.permissions)

    def let_go(self) -> None:
        """Leave it to the processes, which have it attached by now."""
        self._done = True
        self._detach()

    def close(self) -> None:
        """Detach and remove it if nobody got it."""
        if not self._done:
            with contextlib.suppress(OSError):
                sysvipc.remove_segment(self._id)
            self._detach()

    def _detach(self) -> None:
        if self._address is not None:
            sysvipc.shmdt(self._address)
            self._address = None


def _get_segment(record: SegmentRecord, flags: int) -> int:
    if record.permissions.mode & SHM_DEST:
        # It has no key any more; somebody else may.
        with contextlib.suppress(FileExistsError):
            return sysvipc.shmget(record.first_key, record.size_bytes, flags)
        sysvipc.choose_next_id("shm", record.id)
    return sysvipc.shmget(record.permissions.key, record.size_bytes, flags)


def _make_room(record: SegmentRecord) -> None:
    """Remove what the tree has left behind."""
    for here in sysvipc.read_sysvipc("shm"):
        if here.id == record.id and _is_left_behind(here, record):
            sysvipc.remove_segment(here.id)


def prepare(record: SysvRecord, opening: Opening) -> dict[str, Opened]:
    """Make all objects in the restorer's IPC namespace, which is to be theirs.

    Raises:
        RestoreFailed: an id is in use, or the kernel refused something else.
        NotPermitted: we may not choose ids.
    """
    try:
        for name, value in record.settings:
            (SYSCTL / name).write_text(value, encoding="ascii")
        for one in record.segments:
            segment = _Segment(one)
            opening.at_end.append(segment.close)
            segment.fill()
            opening.at_last.append(segment.let_go)
        for semaphores in record.semaphores:
            _make_semaphores(semaphores)
        for queue in record.queues:
            _make_queue(queue)
    except PermissionError as error:
        raise NotPermitted("make System V IPC objects", "run ckpt as root") from error
    except OSError as error:
        raise RestoreFailed(_STEP, error.strerror or str(error)) from error
    return {}


def _made(name: str, wanted: int, get: Callable[[int], int], remove: Callable[[int], None]) -> int:
    """Make an object that has a certain id.

    Args:
        name: of the kind: shm, sem or msg.
        wanted: the id.
        get: makes it, given the flags.
        remove: takes it away again.
    """
    sysvipc.choose_next_id(name, wanted)
    number = get(IPC_CREAT | IPC_EXCL | 0o600)
    if number != wanted:
        remove(number)
        raise RestoreFailed(_STEP, f"id {wanted} ({name}) is in use")
    return number


def _make_semaphores(record: SemaphoresRecord) -> None:
    permissions = record.permissions
    _made(
        "sem",
        record.id,
        lambda flags: sysvipc.semget(permissions.key, len(record.values), flags),
        sysvipc.remove_semaphores,
    )
    sysvipc.set_semaphores(record.id, record.values, permissions)


def _make_queue(record: QueueRecord) -> None:
    permissions = record.permissions
    _made(
        "msg",
        record.id,
        lambda flags: sysvipc.msgget(permissions.key, flags),
        sysvipc.remove_queue,
    )
    # Its owner may have lowered the limit below what is in it.
    filled = max(record.limit_bytes, sum(len(message.text) for message in record.messages))
    sysvipc.set_queue(record.id, filled, permissions)
    for message in record.messages:
        sysvipc.send_message(record.id, message.kind, message.text)
    if filled != record.limit_bytes:
        sysvipc.set_queue(record.id, record.limit_bytes, permissions)


def restore(record: SysvRecord, _rebuilt: Rebuilt) -> Restore:
    """Attach everything again.

    A segment is always attached whole: where only parts of one were left, they are moved to their
    places and the rest is detached.
    """
    of_each: dict[tuple[int, int], list[AttachmentRecord]] = {}
    for one in record.attached:
        of_each.setdefault((one.id, one.start - one.offset_bytes), []).append(one)
    for (number, base), parts in of_each.items():
        span_bytes = _span_bytes(number)
        whole = base >= 0 and _is_whole(parts, span_bytes)
        flags = sum(
            [
                0 if any(part.writable for part in parts) else sysvipc.SHM_RDONLY,
                sysvipc.SHM_EXEC if any(part.prot & PROT_EXEC for part in parts) else 0,
            ]
        )
        replies = yield [call(NR.shmat, number, base if whole else 0, flags)]
        expect(_ATTACHING, replies)
        at = replies[0].value
        calls = list(_iter_protection(parts))
        if not whole:
            calls = [*_iter_moves(parts, at, span_bytes), *calls]
        expect(_ATTACHING, (yield calls))


_ATTACHING = "attaching System V shared memory"


def _span_bytes(number: int) -> int:
    """Return how many bytes of address space a segment takes."""
    try:
        return -(-sysvipc.read_segment_size(number) // PAGE_SIZE) * PAGE_SIZE
    except OSError as error:
        raise RestoreFailed(_ATTACHING, f"segment {number}: {error.strerror}") from error


def _is_whole(parts: list[AttachmentRecord], span_bytes: int) -> bool:
    return sum(part.end - part.start for part in parts) == span_bytes


def _iter_moves(parts: list[AttachmentRecord], at: int, span_bytes: int) -> Iterator[Call]:
    """Move parts of a segment, which is attached at `at`, to their places; detach the rest."""
    left = 0
    for part in sorted(parts, key=lambda part: part.offset_bytes):
        size = part.end - part.start
        if part.offset_bytes > left:
            yield call(NR.munmap, at + left, part.offset_bytes - left)
        yield call(NR.mremap, at + part.offset_bytes, size, size, _TO_A_FIXED_PLACE, part.start)
        left = part.offset_bytes + size
    if left < span_bytes:
        yield call(NR.munmap, at + left, span_bytes - left)


_TO_A_FIXED_PLACE = 1 | 2
"""MREMAP_MAYMOVE, MREMAP_FIXED."""


def _iter_protection(parts: list[AttachmentRecord]) -> Iterator[Call]:
    given = PROT_READ
    given |= PROT_WRITE if any(part.writable for part in parts) else 0
    given |= PROT_EXEC if any(part.prot & PROT_EXEC for part in parts) else 0
    for part in parts:
        if part.prot != given:
            yield call(NR.mprotect, part.start, part.end - part.start, part.prot)
        if part.locked:
            yield call(NR.mlock2, part.start, part.end - part.start, 0)
