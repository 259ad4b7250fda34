"""Which pages exist and which were written: PAGEMAP_SCAN, and the entries of /proc/PID/pagemap.

Two ways to the same knowledge. `scan` lets the kernel find the runs (6.7 on); the functions on
entries read one word a page and find the runs with numpy, for older kernels. The trackers choose;
numpy is imported only by those that need it.

Both describe page tables, so both also show what is no page: with write-protect tracking the
kernel leaves *markers* where nothing was ever mapped, and they look like pages in swap
(`drop_markers`). And both describe an address space, not a process: the descriptor stays with the
one that it was opened on, and answers "nothing here" once that has ended, by exec too. Here this
is `TargetGone`, for an empty answer would be taken for a clean one.
"""

import contextlib
import ctypes
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from ckpt import fault
from ckpt.errors import TargetGone
from ckpt.kernel import ioctl
from ckpt.kernel.failures import proc_failures_of
from ckpt.kernel.libc import PAGE_SIZE, writable_address
from ckpt.units import AddrRange, Fd, Pid

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PAGE_IS_WPALLOWED: Final = 1 << 0
PAGE_IS_WRITTEN: Final = 1 << 1
PAGE_IS_FILE: Final = 1 << 2
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4
PAGE_IS_PFNZERO: Final = 1 << 5
PAGE_IS_HUGE: Final = 1 << 6
PAGE_IS_SOFT_DIRTY: Final = 1 << 7
PAGE_IS_GUARD: Final = 1 << 8

PM_SCAN_WP_MATCHING: Final = 1 << 0
PM_SCAN_CHECK_WPASYNC: Final = 1 << 1

PM_SOFT_DIRTY: Final = 1 << 55
PM_MMAP_EXCLUSIVE: Final = 1 << 56
PM_UFFD_WP: Final = 1 << 57
PM_GUARD_REGION: Final = 1 << 58
PM_FILE: Final = 1 << 61
PM_SWAP: Final = 1 << 62
PM_PRESENT: Final = 1 << 63

ENTRY_BYTES: Final = 8
"""Size of one page's word in /proc/PID/pagemap."""

_FRAME: Final = (1 << 55) - 1
_MARKER_SWAP_TYPE: Final = 0x1F
# Markers take the highest of the 32 swap types, whatever else the kernel was built with
# (SWP_PTE_MARKER, include/linux/swap.h); bits 0-4 of a swapped entry hold the type.

Region = tuple[int, int, int]
"""(start, end, categories): a half-open byte range and the PAGE_IS_ bits that were asked for."""

Run = tuple[int, int]
"""(start, end): a half-open byte range."""


class page_region(ctypes.Structure):  # noqa: N801
    """`struct page_region` (include/uapi/linux/fs.h, 6.7)."""

    start: int
    end: int
    categories: int
    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("categories", ctypes.c_uint64),
    )


class pm_scan_arg(ctypes.Structure):  # noqa: N801
    """`struct pm_scan_arg` (include/uapi/linux/fs.h, 6.7)."""

    start: int
    walk_end: int
    max_pages: int
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),
        ("vec", ctypes.c_uint64),
        ("vec_len", ctypes.c_uint64),
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    )


PAGEMAP_SCAN: Final = fault.number("pagemap-scan", ioctl.iowr("f", 16, pm_scan_arg))

_REGION = struct.Struct("=QQQ")
_VEC_REGIONS = 4096


def open_pagemap(pid: Pid) -> Fd:
    """Open /proc/PID/pagemap for `scan` and `read_entries`; the caller closes it.

    Physical frame numbers and swap types read as 0 unless the opener has CAP_SYS_ADMIN.

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access to it is refused.
    """
    with proc_failures_of(pid, "read the page tables"):
        return Fd(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC))


def scan(
    fd: int,
    span: AddrRange,
    *,
    category_mask: int = 0,
    category_inverted: int = 0,
    category_anyof_mask: int = 0,
    return_mask: int,
    flags: int = 0,
    max_pages: int = 0,
) -> list[Region]:
    """Return the runs of pages of `span` that match, and act on them as `flags` say.

    A page matches when, after flipping the bits of `category_inverted`, it has all categories of
    `category_mask` and at least one of `category_anyof_mask` (0: no such condition). With
    PM_SCAN_WP_MATCHING the matching pages are write-protected in the same step, and mappings
    that are not registered for asynchronous write-protection are skipped in silence; with
    PM_SCAN_CHECK_WPASYNC they are an EPERM.

    State:  any; atomic for each page even while the target runs.
    Shape:  ascending, disjoint, page aligned, neighbours of equal categories joined; `span` may
        cross mappings and holes. With `max_pages` the walk stops at that many pages: go on from
        the end of the last region.
    Kernel: PAGEMAP_SCAN (include/uapi/linux/fs.h, 6.7; PAGE_IS_SOFT_DIRTY and PAGE_IS_GUARD came
        later). A page that was never touched has no categories, yet one that matches exactly
        PAGE_IS_WRITTEN, asked for nothing else, counts as written even so.

    Raises:
        TargetGone: the address space has ended, by exec or with the process.
        OSError: ENOTTY, no such ioctl; EINVAL, a category that this kernel does not know;
            EPERM, see above.
    """
    with _gone_by_esrch(fd):
        regions = _scan(
            fd,
            span,
            category_mask=category_mask,
            category_inverted=category_inverted,
            category_anyof_mask=category_anyof_mask,
            return_mask=return_mask,
            flags=flags,
            max_pages=max_pages,
        )
    check_alive(fd)
    return regions


def _scan(fd: int, span: AddrRange, *, max_pages: int, **masks: int) -> list[Region]:
    vec = bytearray(_VEC_REGIONS * _REGION.size)
    arg = pm_scan_arg(
        size=ctypes.sizeof(pm_scan_arg),
        start=span.start,
        end=span.end,
        vec=writable_address(vec)[0],
        vec_len=_VEC_REGIONS,
        max_pages=max_pages,
        **masks,
    )
    regions: list[Region] = []
    while True:
        n_found = ioctl.call(fd, PAGEMAP_SCAN, arg)
        found: list[Region] = list(_REGION.iter_unpack(memoryview(vec)[: n_found * _REGION.size]))
        join_seam(regions, found)
        regions.extend(found)
        if arg.walk_end >= span.end:
            return regions
        if max_pages:
            arg.max_pages -= sum(end - start for start, end, _ in found) // PAGE_SIZE
            if arg.max_pages == 0:
                return regions
        arg.start = arg.walk_end


def check_alive(fd: int) -> None:
    """Raise TargetGone if the address space has ended: then not even page 0 has an entry."""
    if not os.pread(fd, ENTRY_BYTES, 0):
        raise TargetGone(pid=pid_behind(fd))


@contextlib.contextmanager
def _gone_by_esrch(fd: int) -> Iterator[None]:
    """Turn ESRCH, with which newer kernels refuse to scan what has ended."""
    try:
        yield
    except ProcessLookupError as error:
        raise TargetGone(pid=pid_behind(fd)) from error


def pid_behind(fd: int) -> Pid:
    """Return whose pagemap `fd` is, going by the path that it was opened under."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    return Pid(int(path.split("/")[2]))


def join_seam(regions: list[Region], found: list[Region]) -> None:
    """Join a run that a full vector had cut in two; `found` then starts with the whole."""
    if regions and found:
        start, end, categories = regions[-1]
        if found[0][0] == end and found[0][2] == categories:
            found[0] = (start, found[0][1], categories)
            regions.pop()


def scan_populated_private(fd: int, span: AddrRange, *, of_file: bool = True) -> list[Run]:
    """Return the pages of `span` whose content is the process's own: anonymous, not the zero page.

    In a private file mapping these are the pages that were copied on write. Pages in swap are
    among them, guard regions are not (on kernels that tell).

    Shape:  ascending, disjoint, page aligned. Markers of write-protect tracking may be among
        them, if holes were armed; reading such a page gives zeros.
    Kernel: PAGEMAP_SCAN, 6.7.

    Raises:
        TargetGone: the address space has ended, by exec or with the process.
    """
    absent = PAGE_IS_PFNZERO | (PAGE_IS_FILE if of_file else 0)
    regions = scan(
        fd,
        span,
        category_mask=absent,
        category_inverted=absent,
        category_anyof_mask=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask=PAGE_IS_SWAPPED,
    )
    in_swap = [(start, end) for start, end, categories in regions if categories]
    if not in_swap:
        return [(start, end) for start, end, _ in regions]
    present = [(start, end) for start, end, categories in regions if not categories]
    return _join(sorted(present + list(drop_markers(fd, in_swap))))


def scan_soft_dirty(fd: int, span: AddrRange) -> list[Run]:
    """Return the pages of `span` written (or newly mapped) since clear_refs.

    Shape:  ascending, disjoint, page aligned.
    Kernel: PAGEMAP_SCAN with PAGE_IS_SOFT_DIRTY; CONFIG_MEM_SOFT_DIRTY.

    Raises:
        TargetGone: the address space has ended, by exec or with the process.
        OSError: EINVAL, this kernel's PAGEMAP_SCAN does not know the category.
    """
    regions = scan(fd, span, category_mask=PAGE_IS_SOFT_DIRTY, return_mask=PAGE_IS_SOFT_DIRTY)
    return [(start, end) for start, end, _ in regions]


def scan_guards(fd: int, span: AddrRange) -> list[Run]:
    """Return the guard regions of `span`: pages that the process may not touch.

    Shape:  ascending, disjoint, page aligned.
    Kernel: PAGEMAP_SCAN with PAGE_IS_GUARD; MADV_GUARD_INSTALL (include/uapi/linux/mman.h).

    Raises:
        TargetGone: the address space has ended, by exec or with the process.
        OSError: EINVAL, this kernel's PAGEMAP_SCAN does not know the category.
    """
    regions = scan(fd, span, category_mask=PAGE_IS_GUARD, return_mask=PAGE_IS_GUARD)
    return [(start, end) for start, end, _ in regions]


def drop_markers(fd: int, runs: Iterable[Run]) -> Iterator[Run]:
    """Yield what is left of `runs` without markers and guard regions, which hold no page.

    Needs CAP_SYS_ADMIN (the swap type is hidden otherwise): without it everything is left.
    One word of pagemap is read for each page of `runs`.
    """
    for start, end in runs:
        yield from _iter_unmarked(fd, start, end)


_CHUNK_BYTES = 1 << 20


def _iter_unmarked(fd: int, start: int, end: int) -> Iterator[Run]:
    run_start: int | None = None
    chunk_span = _CHUNK_BYTES // ENTRY_BYTES * PAGE_SIZE
    for at in range(start, end, chunk_span):
        stop = min(at + chunk_span, end)
        raw = os.pread(fd, (stop - at) // PAGE_SIZE * ENTRY_BYTES, at // PAGE_SIZE * ENTRY_BYTES)
        if _is_marker(int.from_bytes(raw[:ENTRY_BYTES], "little")) and raw == raw[:ENTRY_BYTES] * (
            len(raw) // ENTRY_BYTES
        ):
            if run_start is not None:
                yield run_start, at
                run_start = None
            continue
        for index, entry in enumerate(array("Q", raw)):
            addr = at + index * PAGE_SIZE
            if _is_marker(entry):
                if run_start is not None:
                    yield run_start, addr
                    run_start = None
            elif run_start is None:
                run_start = addr
    if run_start is not None:
        yield run_start, end


def _is_marker(entry: int) -> bool:
    return bool(entry & PM_SWAP) and entry & 0x1F == _MARKER_SWAP_TYPE


def _join(runs: Sequence[Run]) -> list[Run]:
    joined: list[Run] = []
    for start, end in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def read_entries(fd: int, span: AddrRange) -> "npt.NDArray[np.uint64]":
    """Return the pagemap words of the pages of `span`, one a page.

    State:  any.
    Shape:  uint64, `span.len_bytes / PAGE_SIZE` long; shorter if the span reaches beyond the
        address space.
    Kernel: /proc/PID/pagemap (proc_pid_pagemap(5), Documentation/admin-guide/mm/pagemap.rst).

    Raises:
        TargetGone: the address space has ended, by exec or with the process.
    """
    import numpy as np

    words = np.empty(span.len_bytes // PAGE_SIZE, dtype=np.uint64)
    if len(words) == 0:
        return words
    view = words.data.cast("B")
    offset = span.start // PAGE_SIZE * ENTRY_BYTES
    done = 0
    while done < len(view):
        moved = os.preadv(fd, [view[done:]], offset + done)
        if moved == 0:
            break
        done += moved
    if done < len(view):
        check_alive(fd)
    return words[: done // ENTRY_BYTES]


def read_words(fd: int, span: AddrRange) -> "array[int]":
    """Return the same for a small span as an array of numbers, without numpy.

    Raises:
        TargetGone: the address space has ended, by exec or with the process.
    """
    n_bytes = span.len_bytes // PAGE_SIZE * ENTRY_BYTES
    raw = os.pread(fd, n_bytes, span.start // PAGE_SIZE * ENTRY_BYTES)
    if len(raw) < n_bytes:
        check_alive(fd)
    return array("Q", raw)


def populated_private(entries: "npt.NDArray[np.uint64]") -> "npt.NDArray[np.bool_]":
    """Tell for each entry whether the page's content is the process's own.

    True for anonymous pages, in memory or in swap, and the zero page (an entry does not show
    it); False for pages of a file, for holes, markers and guard regions.

    Shape:  bool, as long as `entries`.
    """
    import numpy as np

    there = (entries & np.uint64(PM_PRESENT | PM_SWAP)) != 0
    of_file = (entries & np.uint64(PM_FILE)) != 0
    swapped = (entries & np.uint64(PM_SWAP)) != 0
    marker = swapped & ((entries & np.uint64(0x1F)) == _MARKER_SWAP_TYPE)
    populated: npt.NDArray[np.bool_] = there & ~of_file & ~marker
    return populated


def soft_dirty(entries: "npt.NDArray[np.uint64]") -> "npt.NDArray[np.bool_]":
    """Tell for each entry whether the page was written (or newly mapped) since clear_refs.

    Shape:  bool, as long as `entries`. A hole of a mapping made since then is dirty too.
    Kernel: CONFIG_MEM_SOFT_DIRTY; always False without it.
    """
    import numpy as np

    dirty: npt.NDArray[np.bool_] = (entries & np.uint64(PM_SOFT_DIRTY)) != 0
    return dirty


def exclusive(entries: "npt.NDArray[np.uint64]") -> "npt.NDArray[np.bool_]":
    """Tell for each entry whether the page is present and mapped nowhere else, the zero page never.

    Pages in swap count as exclusive: what is there is content.

    Kernel: bits 56 (4.2), 62 and 63 of pagemap.
    """
    import numpy as np

    mapped_once: npt.NDArray[np.bool_] = (entries & np.uint64(PM_MMAP_EXCLUSIVE | PM_SWAP)) != 0
    return mapped_once


def shared_frames(entries: "npt.NDArray[np.uint64]") -> "npt.NDArray[np.uint64]":
    """Return the page frame of each entry whose page is anonymous and may be mapped elsewhere too.

    0 for all others, and for all without CAP_SYS_ADMIN.

    Shape:  uint64, as long as `entries`.
    Kernel: bits 0-54, 56, 61 to 63 of pagemap.
    """
    import numpy as np

    kind = entries & np.uint64(PM_PRESENT | PM_SWAP | PM_FILE | PM_MMAP_EXCLUSIVE)
    frames: npt.NDArray[np.uint64] = np.where(
        kind == np.uint64(PM_PRESENT), entries & np.uint64(_FRAME), np.uint64(0)
    )
    return frames


def runs_of(mask: "npt.NDArray[np.bool_]", start: int) -> list[Run]:
    """Return the runs of True in `mask`, whose first element is the page at `start`.

    Shape:  ascending, disjoint, not adjacent, page aligned byte ranges.
    """
    import numpy as np

    if len(mask) == 0:
        return []
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    addresses = (edges * PAGE_SIZE + start).tolist()
    return list(zip(addresses[::2], addresses[1::2], strict=True))
