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
import functools
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
from ckpt.process import memory
from ckpt.process.clones import Common
from ckpt.process.remote import Call, In, call
from ckpt.resources import mapping_calls as calls
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
    Tree,
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
from ckpt.resources.remapping import Mapping, Part, plan_remapping
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
from ckpt.tracker.populated import opened_pagemap
from ckpt.tracker.spans import Spans, intersect, join, subtract
from ckpt.units import AddrRange, Fd, Pid, RemoteAddr

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
_MADV_GUARD_INSTALL = 102
_MAX_OFFSET = 1 << 63


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
            in_file = 0 <= vma.offset_bytes < _MAX_OFFSET and not vma.offset_bytes % arch.PAGE_SIZE
            if vma.end % arch.PAGE_SIZE or not in_file:
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
    stat = stopped.frozen.stat
    exe = identify_link(f"/proc/{pid}/exe")
    files = looked.files.identify(pid, _identified(stopped.tree))
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


_IDENTIFIED = "mapped files now"


def _identified(tree: Tree) -> dict[object, FileIdentity]:
    """Return what mapped files were found to be in this capture: of most, many processes."""
    if tree.claim(_IDENTIFIED):
        tree.notes[_IDENTIFIED] = {}
    identified: dict[object, FileIdentity] = tree.notes[_IDENTIFIED]
    return identified


def _read_guards(pid: Pid, vmas: Iterable[VmaRecord]) -> Spans:
    """Return the guard regions; takes about 1 ms for each GiB that is populated."""
    own = join((v.start, v.end) for v in vmas if not v.special)
    if not own:
        return []
    with opened_pagemap(pid) as fd:
        # All at once: what is no mapping costs nothing, and has none.
        whole = AddrRange(RemoteAddr(own[0][0]), RemoteAddr(own[-1][1]))
        return intersect(join(pagemap.scan_guards(fd, whole)), own)


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
            return _digest(memory.read(pid, vma.span.start, vma.span.len_bytes))
    return ""


@functools.lru_cache(maxsize=4)
def _digest(code: bytes) -> str:
    """Return a digest of code that most processes have in common."""
    return hashlib.sha256(code).hexdigest()


def check_host(record: MemoryRecord, features: Features) -> Iterator[Finding]:
    """Name what this kernel lacks, or maps into each process otherwise than the image's did."""
    if record.guards and not features.pagemap_scan_guard:
        yield Finding("guard regions", "this kernel has none, or does not show them")
    if any("sl" in vma.flags for vma in _mapped(record)) and not features.mseal:
        yield Finding("sealed memory", "this kernel has no mseal")
    here, vdso = _given_by_kernel()
    remedy = "restore under the kernel that the image was made under"
    for vma in record.vmas:
        if vma.special and here.get(vma.special) != vma.end - vma.start:
            yield Finding(vma.special, "this kernel has it in another size, or not at all", remedy)
            return
    if record.vdso != vdso:
        yield Finding("[vdso]", "the code that this kernel gives to processes is another", remedy)


@functools.lru_cache(maxsize=1)
def _given_by_kernel() -> tuple[dict[str, int], str]:
    """Return the sizes of what this kernel maps into each process, and its vdso's digest."""
    ours = list(maps.read_maps(Pid(os.getpid())))
    sizes = {vma.path: vma.span.len_bytes for vma in ours if vma.path in KERNEL_VMAS}
    return sizes, digest_of_vdso(Pid(os.getpid()), ours)


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
    """Make the embryo's address space that of the image; of what it has, what fits stays.

    Private memory is writable then, and all is as a child can have it too: see `finish`.
    """
    here = list(iter_own_vmas(maps.read_maps(rebuilt.pid)))
    mapped = join((v.span.start, v.span.end) for v in here if v.path not in KERNEL_VMAS)
    arena = rebuilt.embryo.arena.span
    mapped = subtract(mapped, [(arena.start, arena.end)])
    now = list(rebuilt.mapped)
    if subtract(join((one.start, one.end) for one in now), mapped):
        now = []  # it is not what it is said to be; all anew is right in any case
    plan = plan_remapping(now, mappings_of(record), mapped)
    vmas = list(_mapped(record))
    new = [_part_of(vmas[part.index], part) for part in plan.new]
    unmap = [call(NR.munmap, start, end - start) for start, end in plan.unmap]
    moves = _plan_moves(record, here, rebuilt)
    expect("clearing the address space", (yield unmap + moves))
    expect("mapping memory", (yield [calls.bear(vma, _fd_of(vma, rebuilt)) for vma in new]))
    expect("advising memory", (yield list(calls.iter_advice_born(new))))
    changed = [_part_of(vmas[part.index], part) for part in plan.protect]
    protections = [calls.protect(vma, calls.born_prot(vma)) for vma in changed]
    expect("protecting memory", (yield protections))
    rebuilt.fill(plan.keep)


def finish(record: MemoryRecord, rebuilt: Rebuilt) -> Restore:
    """Give mappings what a child would not inherit, or could not undo: they are filled."""
    vmas = list(_mapped(record))
    expect("advising memory", (yield list(calls.iter_advice_filled(vmas))))
    expect("guarding memory", (yield list(_iter_guards(record))))
    expect("protecting memory", (yield list(calls.iter_protection(vmas))))
    expect("naming memory", (yield list(calls.iter_names(vmas))))
    # Locking reaches for all pages; that some may not be touched does not undo it.
    replies = yield list(calls.iter_locks(vmas))
    expect("locking memory", (reply for reply in replies if reply.error != errno.ENOMEM))
    expect("sealing memory", (yield list(calls.iter_seals(vmas))))
    expect("setting the mm fields", (yield [_mm_map(record, rebuilt)]))


def mappings_of(record: MemoryRecord, *, joins: bool = True) -> list[Mapping]:
    """Return the mappings that `restore` makes, as they are before `finish`.

    Args:
        record: of the address space.
        joins: see `Mapping.joins`; False: they are inherited.
    """
    files = [(file.path, file.content) for file in record.files]
    return [
        Mapping(
            start=vma.start,
            end=vma.end,
            backing=(
                vma.shared,
                files[vma.file] if vma.file >= 0 else None,
                frozenset(vma.flags) & (calls.FIXED | ({"mw"} if vma.shared else set())),
            ),
            offset_bytes=vma.offset_bytes if vma.file >= 0 else None,
            prot=calls.born_prot(vma),
            joins=joins,
        )
        for vma in _mapped(record)
    ]


def inheritable(record: MemoryRecord) -> list[Mapping]:
    """Return what of `mappings_of` a child is born with, content and all."""
    dropped = {vma.start for vma in record.vmas if "dp" in vma.flags}
    return [one for one in mappings_of(record, joins=False) if one.start not in dropped]


def _part_of(vma: VmaRecord, part: Part) -> VmaRecord:
    offset = vma.offset_bytes + part.start - vma.start if vma.file >= 0 else 0
    return attrs.evolve(vma, start=part.start, end=part.end, offset_bytes=offset)


def _mapped(record: MemoryRecord) -> Iterator[VmaRecord]:
    return (vma for vma in record.vmas if not vma.special)


def _fd_of(vma: VmaRecord, rebuilt: Rebuilt) -> int:
    return rebuilt.inherited[_key(vma.file)] if vma.file >= 0 else -1


def _plan_moves(record: MemoryRecord, vmas: Iterable[maps.Vma], rebuilt: Rebuilt) -> list[Call]:
    """Move the kernel's own mappings to their old place.

    They move through a spare place beside the arena, since old and new place may overlap.
    """
    here = {vma.path: vma.span for vma in vmas if vma.path in KERNEL_VMAS}
    away = []
    spare = rebuilt.embryo.arena.span.end
    moves = []
    for wanted in record.vmas:
        if wanted.special:
            now = here.pop(wanted.special)
            if now == wanted.span:
                continue
            away.append(calls.move(now.start, now.len_bytes, spare))
            moves.append(calls.move(spare, now.len_bytes, wanted.start))
            spare = RemoteAddr(spare + now.len_bytes)
    away += [call(NR.munmap, span.start, span.len_bytes) for span in here.values()]
    return away + moves


def _iter_guards(record: MemoryRecord) -> Iterator[Call]:
    # Before the protection: the first kernels that had them wanted writable memory.
    for start, end in record.guards:
        yield call(NR.madvise, start, end - start, _MADV_GUARD_INSTALL)


def _mm_map(record: MemoryRecord, rebuilt: Rebuilt) -> Call:
    raw = prctl.prctl_mm_map(
        **attrs.asdict(record.mm),
        auxv_size=len(record.auxv),
        exe_fd=rebuilt.inherited["exe"],
    )
    argument = In(bytes(raw), ((prctl.prctl_mm_map.auxv.offset, record.auxv),))
    return call(NR.prctl, prctl.Prctl.SET_MM, prctl.MmField.MAP, argument, ctypes.sizeof(raw), 0)


MEMORY = Resource(
    "memory",
    MemoryRecord,
    Stage.MEMORY,
    capture=capture,
    restore=restore,
    finish=finish,
    common=Common.MEMORY,
    look=look,
    settle=settle,
    check_host=check_host,
    check_files=check_files,
    prepare=prepare,
)
