"""Soft-dirty bits read with the standard library alone.

Written apart from ckpt on purpose: it is what ckpt's own reading is compared with.
Kernel: Documentation/admin-guide/mm/soft-dirty.rst and pagemap.rst; include/uapi/linux/fs.h.
"""

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from integration.kernels.inside.pages_process import PAGE

SOFT_DIRTY_BIT = 55
EXCLUSIVE_BIT = 56
SWAPPED_BIT = 62
PRESENT_BIT = 63
FRAME_MASK = (1 << 55) - 1
ZERO_PAGE_FLAG_BIT = 24
"""KPF_ZERO_PAGE (include/uapi/linux/kernel-page-flags.h)"""
PAGEMAP_SCAN = 0xC0606610
"""_IOWR('f', 16, struct pm_scan_arg)"""
PAGE_IS_SOFT_DIRTY = 1 << 7


class PmScanArg(ctypes.Structure):
    """struct pm_scan_arg."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages"),
            *("category_inverted", "category_mask", "category_anyof_mask", "return_mask"),
        )
    ]


class PageRegion(ctypes.Structure):
    """struct page_region."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("start", "end", "categories")]


def clear_soft_dirty(proc: Path) -> None:
    """Do step 1 of the documentation."""
    (proc / "clear_refs").write_text("4")


def read_entries(proc: Path, addr: int, n_pages: int) -> tuple[int, ...]:
    """Return the words of pagemap, one a page."""
    with open(proc / "pagemap", "rb", buffering=0) as pagemap:
        raw = os.pread(pagemap.fileno(), n_pages * 8, addr // PAGE * 8)
    return struct.unpack(f"={n_pages}Q", raw)


def pages_with(bit: int, entries: Iterable[int]) -> set[int]:
    """Return the pages whose `bit` is set."""
    return {page for page, entry in enumerate(entries) if entry >> bit & 1}


def read_soft_dirty(proc: Path, addr: int, n_pages: int) -> set[int]:
    """Do step 3: return the pages, counted from `addr`, whose bit 55 is set."""
    return pages_with(SOFT_DIRTY_BIT, read_entries(proc, addr, n_pages))


def read_absent(proc: Path, addr: int, n_pages: int) -> set[int]:
    """Return the pages that are neither in memory nor in swap."""
    entries = read_entries(proc, addr, n_pages)
    there = pages_with(PRESENT_BIT, entries) | pages_with(SWAPPED_BIT, entries)
    return set(range(n_pages)) - there


def read_zero_pages(proc: Path, addr: int, n_pages: int) -> set[int]:
    """Return the pages that are the kernel's own page of zeros."""
    entries = read_entries(proc, addr, n_pages)
    with open("/proc/kpageflags", "rb", buffering=0) as flags:
        return {
            page
            for page in pages_with(PRESENT_BIT, entries)
            if int.from_bytes(
                os.pread(flags.fileno(), 8, (entries[page] & FRAME_MASK) * 8), "little"
            )
            >> ZERO_PAGE_FLAG_BIT
            & 1
        }


def scan_soft_dirty(proc: Path, addr: int, n_pages: int) -> set[int]:
    """Return the same by PAGEMAP_SCAN; OSError where the kernel has no such call or category."""
    regions = (PageRegion * n_pages)()
    arg = PmScanArg(
        size=ctypes.sizeof(PmScanArg),
        start=addr,
        end=addr + n_pages * PAGE,
        vec=ctypes.addressof(regions),
        vec_len=n_pages,
        category_mask=PAGE_IS_SOFT_DIRTY,
        return_mask=PAGE_IS_SOFT_DIRTY,
    )
    with open(proc / "pagemap", "rb", buffering=0) as pagemap:
        n_regions = fcntl.ioctl(pagemap, PAGEMAP_SCAN, arg, True)
    assert arg.walk_end == arg.end
    return {
        page
        for region in regions[:n_regions]
        for page in range((region.start - addr) // PAGE, (region.end - addr) // PAGE)
    }
