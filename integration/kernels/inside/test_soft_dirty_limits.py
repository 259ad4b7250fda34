"""What bit 55 does not tell: changed pages that read as clean. A tracker must know them otherwise.

The documentation says that "new and expanded" regions read as dirty. A region that mremap grew or
moved does not, beyond the pages that were there; nor do pages that the kernel takes away, puts its
page of zeros for, or merges. Each test pins down one of these, so that a kernel that changes is
noticed, and shows by which other sign the page can be told.
"""

import mmap
from pathlib import Path

import pytest

from integration.kernels.inside.plain_pagemap import (
    EXCLUSIVE_BIT,
    clear_soft_dirty,
    pages_with,
    read_absent,
    read_entries,
    read_soft_dirty,
    read_zero_pages,
)

PAGE = mmap.PAGESIZE
N_PAGES = 16
ALL = set(range(N_PAGES))
FRONT, BACK = set(range(8)), set(range(8, N_PAGES))
KSM = Path("/sys/kernel/mm/ksm")


@pytest.fixture
def touched(process):
    """A mapping whose pages have all been written, and whose bits are cleared."""
    addr = process.map(N_PAGES)
    process.write(addr, ALL)
    clear_soft_dirty(process.proc)
    return addr


@pytest.fixture
def merging():
    """The kernel's merging of equal pages, running without a pause."""
    (KSM / "sleep_millisecs").write_text("0")
    (KSM / "run").write_text("1")
    yield KSM
    (KSM / "run").write_text("2")


def test_a_discarded_page_reads_as_clean_but_is_absent(process, touched):
    process.advise(touched, len(FRONT), mmap.MADV_DONTNEED)
    assert read_soft_dirty(process.proc, touched, N_PAGES) == set()
    assert read_absent(process.proc, touched, N_PAGES) == FRONT


def test_a_discarded_page_that_is_read_again_is_clean_and_present_but_the_page_of_zeros(
    process, touched
):
    process.advise(touched, len(FRONT), mmap.MADV_DONTNEED)
    process.read(touched, FRONT)
    assert read_soft_dirty(process.proc, touched, N_PAGES) == set()
    assert read_absent(process.proc, touched, N_PAGES) == set()
    assert read_zero_pages(process.proc, touched, N_PAGES) == FRONT
    assert pages_with(EXCLUSIVE_BIT, read_entries(process.proc, touched, N_PAGES)) == BACK


def test_a_part_grown_over_a_former_mapping_reads_as_clean_but_is_absent_or_zeros(process, touched):
    process.unmap(touched + len(FRONT) * PAGE, len(BACK))
    assert process.resize(touched, len(FRONT), N_PAGES) == touched
    assert read_soft_dirty(process.proc, touched, N_PAGES) == set()
    assert read_absent(process.proc, touched, N_PAGES) == BACK
    process.read(touched, {8})
    process.write(touched, {9})
    assert read_soft_dirty(process.proc, touched, N_PAGES) == {9}
    assert read_zero_pages(process.proc, touched, N_PAGES) == {8}


def test_the_holes_of_a_remapped_mapping_read_as_clean_but_are_absent(process):
    addr = process.map(N_PAGES)
    process.write(addr, FRONT)
    clear_soft_dirty(process.proc)
    moved = process.move(addr, N_PAGES)
    assert read_soft_dirty(process.proc, moved, N_PAGES) == FRONT
    assert read_absent(process.proc, moved, N_PAGES) == BACK


def test_merged_pages_read_as_clean_though_they_were_written(process, touched, merging):
    process.write(touched, ALL)
    assert read_soft_dirty(process.proc, touched, N_PAGES) == ALL
    process.advise(touched, N_PAGES, mmap.MADV_MERGEABLE)
    while pages_with(EXCLUSIVE_BIT, read_entries(process.proc, touched, N_PAGES)):
        assert (merging / "run").read_text() == "1\n"
    # At most the page that the others were merged with has kept its bit.
    assert len(read_soft_dirty(process.proc, touched, N_PAGES)) <= 1
    # Only the mapping's flag tells, for good: a merged page may be left with one owner.
    assert "mg" in read_vm_flags(process.proc, touched)


def read_vm_flags(proc, addr):
    inside = False
    for line in (proc / "smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            start, end = (int(word, 16) for word in first.split("-"))
            inside = start <= addr < end
        elif inside and first == "VmFlags:":
            return set(rest)
    raise AssertionError(f"no mapping at {addr:x}")
