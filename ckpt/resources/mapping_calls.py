"""The calls that make a mapping what its record says; `memory.py` orders them.

    born    mmap, and advice on how pages are allocated: writable, if it is private
    filled  advice that a child would inherit or lack, protection, name, lock, seal

Kernel: mmap(2), mremap(2), madvise(2), mprotect(2), mlock2(2), mseal(2), PR_SET_VMA_ANON_NAME.
"""

from collections.abc import Iterable, Iterator

from ckpt.kernel import prctl
from ckpt.kernel.arch import NR
from ckpt.process.remote import Call, In, call
from ckpt.resources.vmas import PROT_READ, PROT_WRITE, VmaRecord

_MAP_SHARED, _MAP_PRIVATE, _MAP_DROPPABLE, _MAP_ANONYMOUS = 0x01, 0x02, 0x08, 0x20
_MAP_GROWSDOWN, _MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x0100, 0x4000, 0x100000
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MLOCK_ONFAULT = 1
_MADV_DONTNEED = 4

_MADVISE_BORN = {"hg": 14, "nh": 15}
"""VmFlags code -> advice that changes how pages are allocated."""
_MADVISE_FILLED = {"sr": 2, "rr": 1, "dc": 10, "mg": 12, "dd": 16, "wf": 18}
FIXED = frozenset({"gd", "nr", "dp", *_MADVISE_BORN})
"""VmFlags codes that a mapping has from the start, or that nothing takes away again."""


def born_prot(vma: VmaRecord) -> int:
    """Return the protection until it is filled: that is done by writing."""
    return vma.prot if vma.shared else PROT_READ | PROT_WRITE


def bear(vma: VmaRecord, fd: int) -> Call:
    """Map it where nothing is mapped.

    Args:
        vma: all of it, or a part.
        fd: of its file, -1 if there is none.
    """
    flags = _MAP_FIXED_NOREPLACE | (_MAP_SHARED if vma.shared else _MAP_PRIVATE)
    if "dp" in vma.flags:
        flags = _MAP_FIXED_NOREPLACE | _MAP_DROPPABLE
    flags |= _MAP_GROWSDOWN if "gd" in vma.flags else 0
    flags |= _MAP_NORESERVE if "nr" in vma.flags else 0
    flags |= _MAP_ANONYMOUS if vma.file < 0 else 0
    size = vma.end - vma.start
    return call(NR.mmap, vma.start, size, born_prot(vma), flags, fd, vma.offset_bytes)


def protect(vma: VmaRecord, prot: int) -> Call:
    """Change the protection."""
    return call(NR.mprotect, vma.start, vma.end - vma.start, prot)


def drop(start: int, end: int) -> Call:
    """Give pages up: private memory is zero then, or what its file has."""
    return call(NR.madvise, start, end - start, _MADV_DONTNEED)


def move(start: int, size: int, to: int) -> Call:
    """Move a mapping of the kernel's."""
    return call(NR.mremap, start, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, to)


def iter_advice_born(vmas: Iterable[VmaRecord]) -> Iterator[Call]:
    """Give the advice that matters before there are pages."""
    return _iter_advice(vmas, _MADVISE_BORN)


def iter_advice_filled(vmas: Iterable[VmaRecord]) -> Iterator[Call]:
    """Give the advice that would be in the way before."""
    return _iter_advice(vmas, _MADVISE_FILLED)


def _iter_advice(vmas: Iterable[VmaRecord], advice: dict[str, int]) -> Iterator[Call]:
    for vma in vmas:
        for code, number in advice.items():
            if code in vma.flags:
                yield call(NR.madvise, vma.start, vma.end - vma.start, number)


def iter_protection(vmas: Iterable[VmaRecord]) -> Iterator[Call]:
    """Give those that were born with another protection their own."""
    return (protect(vma, vma.prot) for vma in vmas if vma.prot != born_prot(vma))


def iter_locks(vmas: Iterable[VmaRecord]) -> Iterator[Call]:
    """Lock what was locked."""
    for vma in vmas:
        if "lo" in vma.flags:
            on_fault = _MLOCK_ONFAULT if "lf" in vma.flags else 0
            yield call(NR.mlock2, vma.start, vma.end - vma.start, on_fault)


def iter_seals(vmas: Iterable[VmaRecord]) -> Iterator[Call]:
    """Seal what was sealed."""
    return (call(NR.mseal, vma.start, vma.end - vma.start, 0) for vma in vmas if "sl" in vma.flags)


def iter_names(vmas: Iterable[VmaRecord]) -> Iterator[Call]:
    """Name what had a name."""
    for vma in vmas:
        if vma.name:
            yield call(
                NR.prctl,
                prctl.Prctl.SET_VMA,
                prctl.PR_SET_VMA_ANON_NAME,
                vma.start,
                vma.end - vma.start,
                In(vma.name.encode() + b"\0"),
            )
