"""System V IPC: shared memory segments, semaphore sets, message queues.

Objects of System V belong to an IPC namespace, not to a process. So it depends on whose that is:

    the tree has its own     all of it is captured and made anew in the new one (see `namespaces`),
                             with the settings below /proc/sys/kernel that are the namespace's
    it is ckpt's             the segments that the tree has attached; nothing else can be
                             attributed to it. Semaphores and queues stay what they are: like files,
                             they are found again where the tree left them

Each comes back under its id: System V has no other names for them. A segment that is still there
when its tree is restored, under the same id and key, and attached to nobody, is what the tree left
behind; it is replaced. Segments are made and filled by the restorer, which has them attached until
all processes have.

Kernel: /proc/sysvipc, /proc/PID/maps (the inode of a segment is its id), /proc/PID/map_files;
/proc/sys/kernel/{shm,sem,msg}_next_id; shmctl(2), semctl(2), msgctl(2), MSG_COPY of msgop(2).

- Creator, times, and the pids of who did what last are the restorer's.
- What SEM_UNDO would take back at the end of a process is not known, and lost.
- Refused before the target is stopped: segments with more data than `MAX_DATA_BYTES`, since they
  travel among the records, whole in each generation; those of huge pages.
- Refused before anything is started: an id or a key that somebody uses.
- A restore that is killed leaves the segments behind that it has made.
"""

import contextlib
import os
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import attrs

from ckpt.errors import Finding, NotPermitted, RestoreFailed, UnsupportedState
from ckpt.kernel import sysvipc
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features
from ckpt.kernel.libc import PAGE_SIZE
from ckpt.kernel.namespaces import inside, read_namespace
from ckpt.kernel.procfs import maps
from ckpt.kernel.sysvipc import (
    IPC_CREAT,
    IPC_EXCL,
    SEGMENT_PATH,
    SHM_DEST,
    Listed,
    Permissions,
    is_segment,
)
from ckpt.process.remote import Call, call
from ckpt.resources.base import (
    Capture,
    Later,
    Opened,
    Rebuilt,
    Resource,
    Restore,
    Stage,
    Stopped,
    Target,
    expect,
)
from ckpt.resources.vmas import PROT_EXEC, PROT_READ, PROT_WRITE, Looked
from ckpt.units import Fd, Pid

MAX_DATA_BYTES = 16 << 20
MEMORY_NOTE = "memory"
"""Under which `memory.py` notes all mappings with their flags."""
_SETTINGS = (
    *("sem", "shmmax", "shmall", "shmmni", "shm_rmid_forced"),
    *("msgmax", "msgmnb", "msgmni"),
)
_SYSCTL = Path("/proc/sys/kernel")
_STEP = "making System V IPC anew"


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
        if any(one.offset_bytes < 0 or one.len_bytes < 0 for one in self.data):
            raise ValueError("data of a segment lies before it")
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


@attrs.frozen(slots=True, repr=False)
class MessageRecord:
    """A message."""

    kind: int
    """Its type."""
    text: bytes


@attrs.frozen(slots=True, repr=False)
class QueueRecord:
    """A message queue."""

    id: int
    permissions: Permissions
    limit_bytes: int
    messages: tuple[MessageRecord, ...]


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


# -- into the image ------------------------------------------------------------------------------


def _has_own(pid: Pid) -> bool:
    """Tell whether a process is in another IPC namespace than we are."""
    try:
        return read_namespace(pid, "ipc") != read_namespace(Pid(os.getpid()), "ipc")
    except OSError:
        # It ended, or the kernel has no such namespaces.
        return False


def _iter_attached(lines: Iterable[str]) -> Iterator[tuple[str, maps.Vma]]:
    """Yield the mappings of segments, with their lines."""
    for line in lines:
        if f" {SEGMENT_PATH}" in line:
            (vma,) = maps.parse_maps(line)
            if is_segment(vma.path):
                yield line, vma


def look(target: Target) -> Iterator[Finding]:
    """Name segments that cannot travel."""
    for _, vma in _iter_attached(maps.read_lines(target.pid)):
        with contextlib.suppress(OSError):
            n_bytes = os.stat(_map_file(target.pid, vma)).st_blocks * 512
            if n_bytes > MAX_DATA_BYTES:
                yield Finding(
                    f"memory {vma.span} {vma.path}",
                    f"is System V shared memory with {n_bytes >> 20} MiB of data, of which no more"
                    f" than {MAX_DATA_BYTES >> 20} MiB are supported",
                )


def _map_file(pid: Pid, vma: maps.Vma) -> str:
    return f"/proc/{pid}/map_files/{vma.span.start:x}-{vma.span.end:x}"


def capture(stopped: Stopped) -> Capture[SysvRecord]:
    """Read what is there; nothing changes by that.

    Raises:
        UnsupportedState: a segment has more data than may travel.
    """
    yield []
    pid = stopped.pid
    mappings = dict(_iter_attached(stopped.task.maps_lines))
    attached = {vma.inode: vma for vma in mappings.values()}
    own = pid == stopped.tree.pids[0] and _has_own(pid)
    if not attached and not own:
        return SysvRecord((), (), (), (), ())
    attachments = tuple(_attachment(stopped, *one) for one in mappings.items())
    with inside(pid, "ipc"):
        listed = {one.id: one for one in sysvipc.read_sysvipc("shm")}
        wanted = [n for n in (listed if own else attached) if stopped.tree.claim((SEGMENT_PATH, n))]
        raw = [_read_segment(pid, listed, n, attached.get(n)) for n in wanted]
        semaphores = tuple(map(_read_set, sysvipc.read_sysvipc("sem"))) if own else ()
        queues = tuple(map(_read_queue, sysvipc.read_sysvipc("msg"))) if own else ()
        settings = tuple(_iter_settings()) if own else ()
    return Later(
        lambda: SysvRecord(
            attachments, tuple(one.build() for one in raw), semaphores, queues, settings
        )
    )


def _attachment(stopped: Stopped, line: str, vma: maps.Vma) -> AttachmentRecord:
    # What the line does not tell was looked at before, by whoever captures the memory.
    looked = stopped.notes.get(MEMORY_NOTE)
    known = looked.vmas.get(line) if isinstance(looked, Looked) else None
    flags = known.flags if known is not None else frozenset({"mw"})
    return AttachmentRecord(
        id=vma.inode,
        start=vma.span.start,
        end=vma.span.end,
        offset_bytes=vma.offset_bytes,
        prot=PROT_READ * vma.readable | PROT_WRITE * vma.writable | PROT_EXEC * vma.executable,
        writable=vma.writable or "mw" in flags,
        locked="lo" in flags,
    )


@attrs.frozen(slots=True, repr=False)
class _Raw:
    """A segment whose data is still to be packed."""

    listed: Listed
    first_key: int
    data: list[tuple[int, bytes]]
    """(offset, bytes)."""

    def build(self) -> SegmentRecord:
        return SegmentRecord(
            id=self.listed.id,
            permissions=self.listed.permissions,
            first_key=self.first_key,
            size_bytes=self.listed.fields["size"],
            data=tuple(
                DataRecord(offset, len(raw), zlib.compress(raw, 1)) for offset, raw in self.data
            ),
        )


def _read_segment(
    pid: Pid, listed: dict[int, Listed], number: int, attached: maps.Vma | None
) -> _Raw:
    if number not in listed:
        problem = "is System V shared memory of another IPC namespace than the process is in"
        raise UnsupportedState(pid, (Finding(f"segment {number}", f"{problem}, not supported"),))
    one = listed[number]
    if attached is not None:
        first_key = int((attached.path or "").removeprefix(SEGMENT_PATH), 16)
        return _Raw(one, first_key, _read_data(pid, _map_file(pid, attached), one))
    at = sysvipc.shmat(number, sysvipc.SHM_RDONLY)
    try:
        end = at + -(-one.fields["size"] // PAGE_SIZE) * PAGE_SIZE
        data = _read_data(pid, f"/proc/self/map_files/{at:x}-{end:x}", one)
        return _Raw(one, one.permissions.key & 0xFFFF_FFFF, data)
    finally:
        sysvipc.shmdt(at)


def _read_data(pid: Pid, path: str, listed: Listed) -> list[tuple[int, bytes]]:
    """Read what is no hole of a segment, by way of a mapping of it."""
    size = listed.fields["size"]
    data: list[tuple[int, bytes]] = []
    total = end = 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while end < size:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:
                break
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
            total += end - start
            if total > MAX_DATA_BYTES:
                problem = f"has more than {MAX_DATA_BYTES >> 20} MiB of data"
                raise UnsupportedState(pid, (Finding(f"segment {listed.id}", problem),))
            if start < size:
                data.append((start, os.pread(fd, end - start, start)))
    finally:
        os.close(fd)
    return data


def _read_set(listed: Listed) -> SemaphoresRecord:
    values = sysvipc.read_semaphores(listed.id, listed.fields["nsems"])
    return SemaphoresRecord(listed.id, listed.permissions, values)


def _read_queue(listed: Listed) -> QueueRecord:
    messages: list[MessageRecord] = []
    while True:
        message = sysvipc.copy_message(listed.id, len(messages), listed.fields["cbytes"])
        if message is None:
            break
        messages.append(MessageRecord(*message))
    limit = sysvipc.read_queue_limit(listed.id)
    return QueueRecord(listed.id, listed.permissions, limit, tuple(messages))


def _iter_settings() -> Iterator[tuple[str, str]]:
    for name in _SETTINGS:
        with contextlib.suppress(OSError):
            yield name, (_SYSCTL / name).read_text(encoding="ascii").strip()


# -- and back ------------------------------------------------------------------------------------


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
    return (
        here.permissions.key == segment.permissions.key
        and here.fields["size"] == segment.size_bytes
        and here.fields["nattch"] == 0
    )


class _Segment:
    """A segment that we have made, and have attached; removed if the restore fails."""

    def __init__(self, record: SegmentRecord) -> None:
        """Make and fill it."""
        self._dies_with_us = bool(record.permissions.mode & SHM_DEST)
        _make_room(record)
        self._id = _made(
            "shm",
            record.id,
            lambda flags: _get_segment(record, flags),
            sysvipc.remove_segment,
        )
        where = read_namespace(Pid(os.getpid()), "ipc")
        self._forget = weakref.finalize(self, _remove_unless_elsewhere, self._id, where)
        self.address = sysvipc.shmat(self._id)
        for one in record.data:
            raw = zlib.decompressobj().decompress(one.packed, one.len_bytes)
            sysvipc.write_attached(self.address, one.offset_bytes, raw)
        sysvipc.set_segment(self._id, record.permissions)

    def let_go(self) -> None:
        """Leave it to the processes, which have it attached by now."""
        self._forget.detach()
        if self._dies_with_us:
            sysvipc.remove_segment(self._id)
        sysvipc.shmdt(self.address)


def _get_segment(record: SegmentRecord, flags: int) -> int:
    if record.permissions.mode & SHM_DEST:
        # It has no key any more; somebody else may.
        with contextlib.suppress(FileExistsError):
            return sysvipc.shmget(record.first_key, record.size_bytes, flags)
        sysvipc.choose_next_id("shm", record.id)
    return sysvipc.shmget(record.permissions.key, record.size_bytes, flags)


def _remove_unless_elsewhere(number: int, namespace: str) -> None:
    """Remove a segment; in a namespace that we have left it is gone already."""
    with contextlib.suppress(OSError):
        if read_namespace(Pid(os.getpid()), "ipc") == namespace:
            sysvipc.remove_segment(number)


def _make_room(record: SegmentRecord) -> None:
    """Remove what the tree has left behind."""
    for here in sysvipc.read_sysvipc("shm"):
        if here.id == record.id and _is_left_behind(here, record):
            sysvipc.remove_segment(here.id)


def prepare(record: SysvRecord, _options: object) -> dict[str, Opened]:
    """Make all objects in the restorer's IPC namespace, which is to be theirs.

    Raises:
        RestoreFailed: an id is in use, or the kernel refused something else.
        NotPermitted: we may not choose ids.
    """
    opened: dict[str, Opened] = {}
    try:
        for name, value in record.settings:
            (_SYSCTL / name).write_text(value, encoding="ascii")
        for one in record.segments:
            segment = _Segment(one)
            # It needs no descriptor, but to be told when all is built.
            opened[f"sysv {one.id}"] = Opened(_any_fd(), at_last=segment.let_go)
        for semaphores in record.semaphores:
            _make_semaphores(semaphores)
        for queue in record.queues:
            _make_queue(queue)
    except OSError as error:
        for one_opened in opened.values():
            os.close(one_opened.fd)
        if isinstance(error, PermissionError):
            raise NotPermitted("make System V IPC objects", "run ckpt as root") from error
        raise RestoreFailed(_STEP, error.strerror or str(error)) from error
    return opened


def _any_fd() -> Fd:
    return Fd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


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


SYSV = Resource(
    "sysv",
    SysvRecord,
    Stage.MEMORY,
    capture=capture,
    restore=restore,
    look=look,
    check_host=check_host,
    prepare=prepare,
)
