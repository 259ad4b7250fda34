"""What the kernel's documentation promises of soft-dirty bits, and what the tracker builds on.

Documentation/admin-guide/mm/soft-dirty.rst: clear (write 4 to clear_refs), wait, read bit 55 of
pagemap.
"""

import errno
import mmap

import pytest

from integration.kernels.inside.plain_pagemap import (
    clear_soft_dirty,
    read_soft_dirty,
    scan_soft_dirty,
)

N_PAGES = 64
ALL = set(range(N_PAGES))
SOME = {0, 3, 4, 31, 63}


@pytest.fixture
def touched(process):
    """A mapping whose pages have all been written before the bits are cleared."""
    addr = process.map(N_PAGES)
    process.write(addr, ALL)
    return addr


def test_after_clear_wait_read_the_written_pages_and_no_others_are_dirty(process, touched):
    assert read_soft_dirty(process.proc, touched, N_PAGES) == ALL
    clear_soft_dirty(process.proc)
    assert read_soft_dirty(process.proc, touched, N_PAGES) == set()
    process.write(touched, SOME)
    assert read_soft_dirty(process.proc, touched, N_PAGES) == SOME


def test_dirty_pages_stay_dirty_until_the_next_clear(process, touched):
    clear_soft_dirty(process.proc)
    process.write(touched, {1})
    process.write(touched, {2})
    assert read_soft_dirty(process.proc, touched, N_PAGES) == {1, 2}
    clear_soft_dirty(process.proc)
    process.write(touched, {2, 5})
    assert read_soft_dirty(process.proc, touched, N_PAGES) == {2, 5}


def test_reading_a_page_leaves_it_clean(process, touched):
    clear_soft_dirty(process.proc)
    process.read(touched, ALL)
    assert read_soft_dirty(process.proc, touched, N_PAGES) == set()


def test_a_page_first_touched_after_the_clear_reads_as_dirty(process):
    addr = process.map(N_PAGES)
    clear_soft_dirty(process.proc)
    assert read_soft_dirty(process.proc, addr, N_PAGES) == set()
    process.write(addr, SOME)
    assert read_soft_dirty(process.proc, addr, N_PAGES) == SOME


def test_a_remapped_page_reads_as_dirty(process, touched):
    clear_soft_dirty(process.proc)
    moved = process.move(touched, N_PAGES)
    assert moved != touched
    assert read_soft_dirty(process.proc, moved, N_PAGES) == ALL


def test_a_new_mapping_reads_as_dirty(process):
    clear_soft_dirty(process.proc)
    addr = process.map(N_PAGES)
    assert read_soft_dirty(process.proc, addr, N_PAGES) == ALL


def test_a_mapping_made_where_another_was_reads_as_dirty(process, touched):
    clear_soft_dirty(process.proc)
    process.unmap(touched, N_PAGES)
    assert process.map(N_PAGES, at=touched) == touched
    assert read_soft_dirty(process.proc, touched, N_PAGES) == ALL


def test_a_written_page_of_a_grown_part_reads_as_dirty(process, touched):
    clear_soft_dirty(process.proc)
    grown = process.resize(touched, N_PAGES, 2 * N_PAGES)
    process.write(grown, {N_PAGES, 2 * N_PAGES - 1})
    assert read_soft_dirty(process.proc, grown, 2 * N_PAGES) >= {N_PAGES, 2 * N_PAGES - 1}


def test_pagemap_scan_agrees_with_bit_55_where_the_kernel_has_it(
    process, touched, kernel_under_test
):
    if "pagemap_scan" not in kernel_under_test.offers:
        with pytest.raises(OSError, match="Inappropriate ioctl") as refused:
            scan_soft_dirty(process.proc, touched, N_PAGES)
        assert refused.value.errno == errno.ENOTTY
        return
    untouched = process.map(N_PAGES)
    clear_soft_dirty(process.proc)
    process.write(touched, SOME)
    process.advise(touched + 3 * mmap.PAGESIZE, 1, mmap.MADV_DONTNEED)
    new = process.map(N_PAGES)
    process.write(new, {7})
    moving = process.map(N_PAGES)
    process.write(moving, SOME)
    moved = process.move(moving, N_PAGES)
    for addr in (touched, untouched, new, moved):
        by_bit = read_soft_dirty(process.proc, addr, N_PAGES)
        assert scan_soft_dirty(process.proc, addr, N_PAGES) == by_bit
    assert read_soft_dirty(process.proc, touched, N_PAGES) == SOME - {3}
