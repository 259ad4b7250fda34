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
import zlib
from collections.abc import Iterable, Iterator

import attrs

from ckpt.errors import Finding, UnsupportedState
from ckpt.kernel import sysvipc
from ckpt.kernel.libc import PAGE_SIZE
from ckpt.kernel.namespaces import inside, read_namespace
from ckpt.kernel.procfs import maps
from ckpt.kernel.sysvipc import SEGMENT_PATH, Listed, is_segment
from ckpt.process.clones import Common
from ckpt.resources.base import Capture, Later, Resource, Stage, Stopped, Target
from ckpt.resources.sysv_rebuild import SYSCTL, check_host, prepare, restore
from ckpt.resources.sysv_record import (
    MAX_DATA_BYTES,
    SETTINGS,
    AttachmentRecord,
    DataRecord,
    MessageRecord,
    QueueRecord,
    SegmentRecord,
    SemaphoresRecord,
    SysvRecord,
)
from ckpt.resources.vmas import PROT_EXEC, PROT_READ, PROT_WRITE, Looked
from ckpt.units import Pid

MEMORY_NOTE = "memory"
"""Under which `memory.py` notes all mappings with their flags."""


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
        if not {"sys_admin", "checkpoint_restore"} & target.features.capabilities:
            problem = "is System V shared memory, which ckpt may not read without cap_sys_admin"
            yield Finding(f"memory {vma.span} {vma.path}", problem, "run ckpt as root")
            return
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
    pid = stopped.pid
    mappings = dict(_iter_attached(stopped.task.maps_lines))
    attached = {vma.inode: vma for vma in mappings.values()}
    own = pid == stopped.tree.pids[0] and _has_own(pid)
    if not attached and not own:
        yield []
        return SysvRecord((), (), (), (), ())
    attachments = tuple(_attachment(stopped, *one) for one in mappings.items())
    with inside(pid, "ipc") if _has_own(pid) else contextlib.nullcontext():
        listed = {one.id: one for one in sysvipc.read_sysvipc("shm")}
        wanted = [n for n in (listed if own else attached) if stopped.tree.claim((SEGMENT_PATH, n))]
        raw = [_read_segment(pid, listed, n, attached.get(n)) for n in wanted]
        semaphores = tuple(map(_read_set, sysvipc.read_sysvipc("sem"))) if own else ()
        queues = tuple(map(_read_queue, sysvipc.read_sysvipc("msg"))) if own else ()
        settings = tuple(_iter_settings()) if own else ()
    yield []
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
    for name in SETTINGS:
        with contextlib.suppress(OSError):
            yield name, (SYSCTL / name).read_text(encoding="ascii").strip()


SYSV = Resource(
    "sysv",
    SysvRecord,
    Stage.MEMORY,
    capture=capture,
    restore=restore,
    common=Common.MEMORY,
    look=look,
    check_host=check_host,
    prepare=prepare,
)
