"""The address space: VMAs, mm fields, executable, auxiliary vector. Not the pages themselves.

Pages are the engine's work (`engine/pages.py`), which calls back between mapping and protecting.

Kernel: /proc/PID/{maps,smaps,stat,auxv,map_files}, mmap(2), mremap(2), madvise(2), mlock(2),
mseal(2), prctl(2) PR_SET_MM_MAP (Linux 3.18) and PR_SET_VMA_ANON_NAME (5.17); PAGEMAP_SCAN for
guard regions (MADV_GUARD_INSTALL), which are not seen by kernels that have them without
PAGE_IS_GUARD (6.13 to 6.15).

Shared anonymous memory, memfd and mapped files that are deleted are files that the restorer makes
(`content.py`). What `mappings.py` names is refused before the target is touched: SysV shared
memory, hugetlb pages, device memory, and more. Two neighbouring mappings that differ in nothing may
come back as one.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator

import attrs

from ckpt.errors import Finding, RestoreFailed
from ckpt.kernel import pagemap, prctl
from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.features import Features
from ckpt.kernel.procfs import files as procfs_files
from ckpt.kernel.procfs import maps
from ckpt.kernel.procfs import stat as procfs_stat
from ckpt.process import memory
from ckpt.process.remote import Call, In, call
from ckpt.resources.base import (
    Capture,
    Opened,
    Opening,
    Rebuilt,
    Resource,
    Restore,
    RestoreOptions,
    Stage,
    Stopped,
    Target,
    expect,
)
from ckpt.resources.content import identify_link
from ckpt.resources.file_identity import (
    FileIdentity,
    describe_absence,
    describe_change,
    describe_loss,
    with_build_id,
)
from ckpt.resources.mappings import KERNEL_VMAS
from ckpt.resources.vmas import (
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    VmaRecord,
    confirm_vmas,
    iter_findings,
    iter_own_vmas,
    look_at_vmas,
)
from ckpt.tracker.populated import iter_ranges, opened_pagemap
from ckpt.tracker.spans import Spans, join, subtract
from ckpt.units import Fd, Pid, RemoteAddr

__all__ = [
    "KERNEL_VMAS",
    "MEMORY",
    "MemoryRecord",
    "MmFields",
    "VmaRecord",
    "digest_of_vdso",
    "iter_own_vmas",
]

_ANY_PROT = PROT_READ | PROT_WRITE | PROT_EXEC
_MAP_SHARED, _MAP_PRIVATE, _MAP_DROPPABLE, _MAP_ANONYMOUS = 0x01, 0x02, 0x08, 0x20
_MAP_GROWSDOWN, _MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x0100, 0x4000, 0x100000
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MLOCK_ONFAULT = 1


_MADVISE_BEFORE_FILL = {"hg": 14, "nh": 15}
"""VmFlags code -> advice that changes how pages are allocated."""
_MADVISE_AFTER_FILL = {"sr": 2, "rr": 1, "dc": 10, "mg": 12, "dd": 16, "wf": 18}
_MADV_GUARD_INSTALL = 102


@attrs.frozen(slots=True, repr=False)
class MmFields:
    """Where the kernel believes the parts of the program to be (`struct prctl_mm_map`)."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int


@attrs.frozen(slots=True, repr=False)
class MemoryRecord:
    """The address space of a process."""

    vmas: tuple[VmaRecord, ...]
    files: tuple[FileIdentity, ...]
    mm: MmFields
    exe: FileIdentity
    auxv: bytes
    vdso: str
    """Digest of the vdso's code (`digest_of_vdso`): a restore moves its own kernel's to this place,
    and the process has its entry points in memory."""
    guards: tuple[tuple[int, int], ...] = ()
    """Guard regions: half-open address ranges inside the mappings, ascending."""

    def __attrs_post_init__(self) -> None:
        """Refuse an address space that cannot be."""
        end = 0
        for vma in self.vmas:
            if not end <= vma.start < vma.end <= arch.USER_END or vma.start % arch.PAGE_SIZE:
                raise ValueError(f"mapping {vma.start:x}-{vma.end:x} is out of order or range")
            if vma.end % arch.PAGE_SIZE or vma.offset_bytes % arch.PAGE_SIZE:
                raise ValueError(f"mapping {vma.start:x}-{vma.end:x} is not of whole pages")
            if not -1 <= vma.file < len(self.files) or vma.prot & ~_ANY_PROT:
                raise ValueError(f"mapping {vma.start:x}-{vma.end:x} has no such file, or prot")
            if vma.special and vma.special not in KERNEL_VMAS:
                raise ValueError(f"the kernel maps no {vma.special!r}")
            end = vma.end
        guards = list(self.guards)
        if subtract(guards, join((vma.start, vma.end) for vma in _mapped(self))):
            raise ValueError("a guard region is outside of all mappings")
        if any(start >= end or (start | end) % arch.PAGE_SIZE for start, end in guards):
            raise ValueError("a guard region is not of whole pages")


_NAME = "memory"


def look(target: Target) -> Iterator[Finding]:
    """Name every mapping that cannot be captured; note all of them, see `vmas.Looked`."""
    looked = look_at_vmas(target.pid)
    target.notes[_NAME] = looked
    yield from iter_findings(target.pid, looked)


def capture(stopped: Stopped) -> Capture[MemoryRecord]:
    """Read the layout of the frozen process; its break is known only inside."""
    pid = stopped.pid
    locked_bytes = stopped.read_status().vm_locked_bytes
    looked = confirm_vmas(pid, stopped.notes.get(_NAME), stopped.task.maps_lines, locked_bytes)
    records = looked.records
    stat = procfs_stat.read_stat(pid)
    exe = identify_link(f"/proc/{pid}/exe")
    files = looked.files.identify(pid)
    guards = _read_guards(pid, records) if stopped.features.pagemap_scan_guard else []
    (brk,) = yield [call(NR.brk, 0)]
    mm = MmFields(
        start_code=stat.start_code,
        end_code=stat.end_code,
        start_data=stat.start_data,
        end_data=stat.end_data,
        start_brk=stat.start_brk,
        brk=brk.value,
        start_stack=stat.start_stack,
        arg_start=stat.arg_start,
        arg_end=stat.arg_end,
        env_start=stat.env_start,
        env_end=stat.env_end,
    )
    return MemoryRecord(
        vmas=records,
        files=files,
        mm=mm,
        exe=exe,
        auxv=procfs_files.read_bytes(pid, "auxv"),
        vdso=digest_of_vdso(pid, looked.vmas.values()),
        guards=tuple(guards),
    )


def _read_guards(pid: Pid, vmas: Iterable[VmaRecord]) -> Spans:
    """Return the guard regions; takes about 1 ms for each GiB that is populated."""
    found: Spans = []
    with opened_pagemap(pid) as fd:
        for span in iter_ranges(join((v.start, v.end) for v in vmas if not v.special)):
            found += pagemap.scan_guards(fd, span)
    return join(found)


def settle(record: MemoryRecord) -> MemoryRecord:
    """Add the build-ids of the executable files."""
    executable = {vma.file for vma in record.vmas if vma.prot & PROT_EXEC}
    return attrs.evolve(
        record,
        files=tuple(
            with_build_id(file) if index in executable else file
            for index, file in enumerate(record.files)
        ),
        exe=with_build_id(record.exe),
    )


def digest_of_vdso(pid: Pid, vmas: Iterable[maps.Vma]) -> str:
    """Return a digest of the code of the vdso, empty if there is none."""
    for vma in vmas:
        if vma.path == "[vdso]":
            return hashlib.sha256(memory.read(pid, vma.span.start, vma.span.len_bytes)).hexdigest()
    return ""


def check_host(record: MemoryRecord, features: Features) -> Iterator[Finding]:
    """Name what this kernel lacks, or maps into each process otherwise than the image's did."""
    if record.guards and not features.pagemap_scan_guard:
        yield Finding("guard regions", "this kernel has none, or does not show them")
    if any("sl" in vma.flags for vma in _mapped(record)) and not features.mseal:
        yield Finding("sealed memory", "this kernel has no mseal")
    ours = list(maps.read_maps(Pid(os.getpid())))
    here = {vma.path: vma.span.len_bytes for vma in ours}
    remedy = "restore under the kernel that the image was made under"
    for vma in record.vmas:
        if vma.special and here.get(vma.special) != vma.end - vma.start:
            yield Finding(vma.special, "this kernel has it in another size, or not at all", remedy)
            return
    if record.vdso != digest_of_vdso(Pid(os.getpid()), ours):
        yield Finding("[vdso]", "the code that this kernel gives to processes is another", remedy)


def check_files(record: MemoryRecord, options: RestoreOptions) -> Iterator[Finding]:
    """Name every mapped file that is missing or is not what it was.

    A file that the process maps shared and may write has changed by the process's own hand; it
    must only not be shorter.
    """
    written = _written_files(record)
    for index, identity in enumerate((*record.files, record.exe)):
        if options.content_of(identity.content, identity.path) is not None:
            continue
        if identity.content:
            yield Finding(f"mapped file {identity.path}", "the image does not hold its content")
            continue
        if identity.path in options.allow_changed:
            change = describe_absence(identity)
        elif index in written:
            change = describe_loss(identity)
        else:
            change = describe_change(identity)
        if change:
            remedy = f"restore the file, or --allow-changed {identity.path}"
            yield Finding(f"mapped file {identity.path}", change, remedy)


def _written_files(record: MemoryRecord) -> set[int]:
    """Return the indices of the files that the process may write through a mapping."""
    return {vma.file for vma in record.vmas if vma.shared and "mw" in vma.flags}


def prepare(record: MemoryRecord, opening: Opening) -> dict[str, Opened]:
    """Open the mapped files and the executable, for the embryo to inherit.

    Raises:
        RestoreFailed: one of them cannot be opened; none is left open.
    """
    writable = _written_files(record)
    wanted = [(_key(index), identity) for index, identity in enumerate(record.files)]
    opened: dict[str, Opened] = {}
    with contextlib.ExitStack() as undo:
        for index, (key, identity) in enumerate([*wanted, ("exe", record.exe)]):
            flags = os.O_RDWR if index in writable else os.O_RDONLY
            path = identity.path
            made = opening.options.content_of(identity.content, path)
            try:
                fd = Fd(os.open(made or path, flags | os.O_CLOEXEC))
            except OSError as error:
                raise RestoreFailed(f"opening {path}", error.strerror or str(error)) from error
            undo.callback(os.close, fd)
            opened[key] = Opened(fd)
        undo.pop_all()
    return opened


def _key(index: int) -> str:
    return f"map {index}"


def restore(record: MemoryRecord, rebuilt: Rebuilt) -> Restore:
    """Replace the embryo's address space by that of the image."""
    expect("clearing the address space", (yield _plan_clear(record, rebuilt)))
    expect("mapping memory", (yield [_mmap(vma, rebuilt) for vma in _mapped(record)]))
    expect("advising memory", (yield list(_iter_advice(record, _MADVISE_BEFORE_FILL))))
    rebuilt.fill()
    expect("advising memory", (yield list(_iter_advice(record, _MADVISE_AFTER_FILL))))
    expect("guarding memory", (yield list(_iter_guards(record))))
    expect("protecting memory", (yield list(_iter_protection(record))))
    expect("naming memory", (yield list(_iter_names(record))))
    # Locking reaches for all pages; that some may not be touched does not undo it.
    replies = yield list(_iter_locks(record))
    expect("locking memory", (reply for reply in replies if reply.error != errno.ENOMEM))
    expect("sealing memory", (yield list(_iter_seals(record))))
    expect("setting the mm fields", (yield [_mm_map(record, rebuilt)]))


def _mapped(record: MemoryRecord) -> Iterator[VmaRecord]:
    return (vma for vma in record.vmas if not vma.special)


def _plan_clear(record: MemoryRecord, rebuilt: Rebuilt) -> list[Call]:
    """Unmap what the seed had, and move the kernel's own mappings to their old place.

    They move through a spare place beside the arena, since old and new place may overlap.
    """
    arena = rebuilt.embryo.arena.span
    here = {}
    calls = []
    for vma in iter_own_vmas(maps.read_maps(rebuilt.pid)):
        if vma.path in KERNEL_VMAS:
            here[vma.path] = vma.span
        elif not vma.span.overlaps(arena):
            calls.append(call(NR.munmap, vma.span.start, vma.span.len_bytes))
    spare = arena.end
    moves = []
    for wanted in record.vmas:
        if wanted.special:
            now = here.pop(wanted.special)
            calls.append(_move(now.start, now.len_bytes, spare))
            moves.append(_move(spare, now.len_bytes, wanted.start))
            spare = RemoteAddr(spare + now.len_bytes)
    calls += [call(NR.munmap, span.start, span.len_bytes) for span in here.values()]
    return calls + moves


def _move(start: int, size: int, to: int) -> Call:
    return call(NR.mremap, start, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, to)


def _mmap(vma: VmaRecord, rebuilt: Rebuilt) -> Call:
    flags = _MAP_FIXED_NOREPLACE | (_MAP_SHARED if vma.shared else _MAP_PRIVATE)
    if "dp" in vma.flags:
        flags = _MAP_FIXED_NOREPLACE | _MAP_DROPPABLE
    flags |= _MAP_GROWSDOWN if "gd" in vma.flags else 0
    flags |= _MAP_NORESERVE if "nr" in vma.flags else 0
    # Pages are filled by writing, so everything private is writable until then.
    prot = vma.prot if vma.shared else PROT_READ | PROT_WRITE
    fd = -1
    if vma.file < 0:
        flags |= _MAP_ANONYMOUS
    else:
        fd = rebuilt.inherited[_key(vma.file)]
    return call(NR.mmap, vma.start, vma.end - vma.start, prot, flags, fd, vma.offset_bytes)


def _iter_advice(record: MemoryRecord, advice: dict[str, int]) -> Iterator[Call]:
    for vma in _mapped(record):
        for code, number in advice.items():
            if code in vma.flags:
                yield call(NR.madvise, vma.start, vma.end - vma.start, number)


def _iter_guards(record: MemoryRecord) -> Iterator[Call]:
    # Before the protection: the first kernels that had them wanted writable memory.
    for start, end in record.guards:
        yield call(NR.madvise, start, end - start, _MADV_GUARD_INSTALL)


def _iter_protection(record: MemoryRecord) -> Iterator[Call]:
    for vma in _mapped(record):
        if not vma.shared and vma.prot != PROT_READ | PROT_WRITE:
            yield call(NR.mprotect, vma.start, vma.end - vma.start, vma.prot)


def _iter_locks(record: MemoryRecord) -> Iterator[Call]:
    for vma in _mapped(record):
        if "lo" in vma.flags:
            on_fault = _MLOCK_ONFAULT if "lf" in vma.flags else 0
            yield call(NR.mlock2, vma.start, vma.end - vma.start, on_fault)


def _iter_seals(record: MemoryRecord) -> Iterator[Call]:
    return (
        call(NR.mseal, vma.start, vma.end - vma.start, 0)
        for vma in _mapped(record)
        if "sl" in vma.flags
    )


def _iter_names(record: MemoryRecord) -> Iterator[Call]:
    for vma in record.vmas:
        if vma.name:
            yield call(
                NR.prctl,
                prctl.Prctl.SET_VMA,
                prctl.PR_SET_VMA_ANON_NAME,
                vma.start,
                vma.end - vma.start,
                In(vma.name.encode() + b"\0"),
            )


def _mm_map(record: MemoryRecord, rebuilt: Rebuilt) -> Call:
    raw = prctl.prctl_mm_map(
        **attrs.asdict(record.mm),
        auxv_size=len(record.auxv),
        exe_fd=prctl.EXE_FD_UNCHANGED if _has_exe(rebuilt) else rebuilt.inherited["exe"],
    )
    argument = In(bytes(raw), ((prctl.prctl_mm_map.auxv.offset, record.auxv),))
    return call(NR.prctl, prctl.Prctl.SET_MM, prctl.MmField.MAP, argument, ctypes.sizeof(raw), 0)


def _has_exe(rebuilt: Rebuilt) -> bool:
    """Tell whether it has the program already, from its parent: setting it again is refused.

    (The kernel lets no program be replaced that is still mapped, not even by itself.)
    """
    root = f"/proc/{rebuilt.pid}"
    wanted = f"{root}/fd/{rebuilt.inherited['exe']}"
    same = os.path.samestat(os.stat(f"{root}/exe"), os.stat(wanted))
    return same and os.readlink(f"{root}/exe") == os.readlink(wanted)


MEMORY = Resource(
    "memory",
    MemoryRecord,
    Stage.MEMORY,
    capture=capture,
    restore=restore,
    look=look,
    settle=settle,
    check_host=check_host,
    check_files=check_files,
    prepare=prepare,
)
