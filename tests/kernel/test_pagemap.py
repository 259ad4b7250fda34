import contextlib
import mmap
import os

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from ckpt.errors import TargetGone
from ckpt.kernel import pagemap
from ckpt.kernel.arch import NR
from ckpt.kernel.clear_refs import clear_soft_dirty
from ckpt.kernel.libc import syscall, writable_address
from ckpt.units import addr_range
from tests.kernel.children import ended, running

PAGE = mmap.PAGESIZE
MADV_GUARD_INSTALL = 102


@contextlib.contextmanager
def memory_of_ours(n_pages):
    memory = mmap.mmap(-1, n_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A huge page would populate the neighbours of the page that is touched.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    with memory:
        yield memory, addr_range(writable_address(memory)[0], n_pages * PAGE)


@contextlib.contextmanager
def opened(pid):
    fd = pagemap.open_pagemap(pid)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def fd():
    with opened(os.getpid()) as fd:
        yield fd


def pages_of(runs, span):
    """The page numbers inside `span` that runs (or regions) cover."""
    return [
        page
        for run in runs
        for page in range((run[0] - span.start) // PAGE, (run[1] - span.start) // PAGE)
    ]


def by_entries(fd, span):
    return pagemap.runs_of(pagemap.populated_private(pagemap.read_entries(fd, span)), span.start)


def by_scan(fd, span):
    return pagemap.scan_populated_private(fd, span)


@pytest.fixture(params=[by_scan, by_entries])
def populated(request):
    if request.param is by_scan:
        request.getfixturevalue("needs_pagemap_scan")
    return request.param


def test_populated_are_the_pages_that_were_written(fd, populated):
    with memory_of_ours(64) as (memory, span):
        written = [0, 1, 2, 10, 30, 31, 63]
        for page in written:
            memory[page * PAGE] = 1
        runs = populated(fd, span)
        assert pages_of(runs, span) == written
        assert len(runs) == 4


def test_nothing_is_populated_that_was_never_touched(fd, populated):
    with memory_of_ours(64) as (_, span):
        assert populated(fd, span) == []


def test_pages_given_back_are_not_populated(fd, populated):
    with memory_of_ours(8) as (memory, span):
        memory[:] = b"x" * (8 * PAGE)
        memory.madvise(mmap.MADV_DONTNEED, 2 * PAGE, 3 * PAGE)
        assert pages_of(populated(fd, span), span) == [0, 1, 5, 6, 7]


def test_a_hole_between_mappings_has_no_pages(fd, populated):
    with memory_of_ours(9) as (memory, span):
        memory[:] = b"x" * (9 * PAGE)
        syscall(NR.munmap, span.start + 4 * PAGE, PAGE)
        try:
            assert pages_of(populated(fd, span), span) == [0, 1, 2, 3, 5, 6, 7, 8]
        finally:
            at = span.start + 4 * PAGE
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
            assert syscall(NR.mmap, at, PAGE, mmap.PROT_READ, flags, -1, 0) == at


@pytest.fixture
def file_of_four_pages(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"f" * (4 * PAGE))
    with path.open("r+b") as file:
        yield file


def test_of_a_private_file_mapping_only_the_copied_pages(fd, populated, file_of_four_pages):
    with mmap.mmap(file_of_four_pages.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        span = addr_range(writable_address(memory)[0], 4 * PAGE)
        assert memory[0] == memory[PAGE] == ord("f")
        memory[2 * PAGE] = 1
        assert pages_of(populated(fd, span), span) == [2]


def test_shared_memory_is_not_private(fd, populated):
    with mmap.mmap(-1, 4 * PAGE) as memory:
        memory[:] = b"s" * (4 * PAGE)
        span = addr_range(writable_address(memory)[0], 4 * PAGE)
        assert populated(fd, span) == []


def test_another_process(populated):
    code = """
        memory = private_memory(16)
        memory[3 * PAGE] = memory[4 * PAGE] = 1
        say(address_of(memory))
        wait()
    """
    with running(code) as child:
        span = addr_range(child.heard()[0], 16 * PAGE)
        with opened(child.pid) as fd:
            assert pages_of(populated(fd, span), span) == [3, 4]


def test_guard_regions_are_no_pages(fd, populated, features):
    with memory_of_ours(8) as (memory, span):
        memory[:] = b"x" * (8 * PAGE)
        try:
            syscall(NR.madvise, span.start + 2 * PAGE, 2 * PAGE, MADV_GUARD_INSTALL)
        except OSError:
            # A kernel without guard regions must not claim to see them.
            assert not features.pagemap_scan_guard
            return
        entry = int(pagemap.read_entries(fd, span)[2])
        hidden = "sys_admin" not in features.capabilities
        assert bool(entry & pagemap.PM_GUARD_REGION) == features.pagemap_scan_guard
        assert pages_of(populated(fd, span), span) == (
            list(range(8)) if hidden else [0, 1, 4, 5, 6, 7]
        )


@pytest.mark.usefixtures("needs_pagemap_scan")
class TestScan:
    def test_regions_carry_the_categories_asked_for(self, fd):
        with memory_of_ours(6) as (memory, span):
            memory[0] = 1
            assert memory[3 * PAGE] == 0
            wanted = pagemap.PAGE_IS_PRESENT | pagemap.PAGE_IS_PFNZERO
            regions = pagemap.scan(
                fd, span, category_mask=pagemap.PAGE_IS_PRESENT, return_mask=wanted
            )
            assert [(pages_of([region], span), region[2]) for region in regions] == [
                ([0], pagemap.PAGE_IS_PRESENT),
                ([3], wanted),
            ]

    def test_inverted_categories(self, fd):
        with memory_of_ours(6) as (memory, span):
            memory[2 * PAGE] = 1
            absent = pagemap.scan(
                fd,
                span,
                category_mask=pagemap.PAGE_IS_PRESENT,
                category_inverted=pagemap.PAGE_IS_PRESENT,
                return_mask=pagemap.PAGE_IS_PRESENT,
            )
            assert pages_of(absent, span) == [0, 1, 3, 4, 5]

    def test_more_regions_than_one_vector_holds(self, fd):
        n_pages = 2 * 2 * 4096 + 100
        with memory_of_ours(n_pages) as (memory, span):
            for page in range(0, n_pages, 2):
                memory[page * PAGE] = 1
            regions = pagemap.scan(
                fd,
                span,
                category_mask=pagemap.PAGE_IS_PRESENT,
                return_mask=pagemap.PAGE_IS_PRESENT,
            )
            assert len(regions) == n_pages // 2
            assert pages_of(regions, span) == list(range(0, n_pages, 2))

    def test_a_region_cut_by_a_full_vector_is_joined(self, fd, monkeypatch):
        monkeypatch.setattr(pagemap, "_VEC_REGIONS", 1)
        with memory_of_ours(40) as (memory, span):
            for page in [*range(5, 9), *range(20, 38)]:
                memory[page * PAGE] = 1
            assert [pages_of([run], span) for run in by_scan(fd, span)] == [
                list(range(5, 9)),
                list(range(20, 38)),
            ]

    def test_max_pages_stops_the_walk(self, fd):
        with memory_of_ours(64) as (memory, span):
            for page in range(0, 64, 3):
                memory[page * PAGE] = 1
            masks = {
                "category_mask": pagemap.PAGE_IS_PRESENT,
                "return_mask": pagemap.PAGE_IS_PRESENT,
            }
            first = pagemap.scan(fd, span, max_pages=5, **masks)
            assert pages_of(first, span) == [0, 3, 6, 9, 12]
            rest = addr_range(first[-1][1], span.end - first[-1][1])
            assert pages_of(pagemap.scan(fd, rest, **masks), span) == list(range(15, 64, 3))

    def test_an_unknown_category_is_refused(self, fd):
        with memory_of_ours(1) as (_, span), pytest.raises(OSError, match="Invalid argument"):
            pagemap.scan(fd, span, return_mask=1 << 63)


@pytest.mark.parametrize("end", ["exec", "kill"])
def test_an_address_space_that_ended_is_not_taken_for_a_clean_one(populated, end):
    code = """
        memory = private_memory(4)
        memory[0] = 1
        say(address_of(memory))
        wait()
        os.execv("/bin/sh", ["sh", "-c", "echo another; read line"])
    """
    with running(code) as child:
        span = addr_range(child.heard()[0], 4 * PAGE)
        with opened(child.pid) as fd:
            assert pages_of(populated(fd, span), span) == [0]
            if end == "exec":
                child.tell()
                assert child.heard() == ["another"]
            else:
                child.kill()
            with pytest.raises(TargetGone) as caught:
                populated(fd, span)
            assert caught.value.pid == child.pid


def test_beyond_the_address_space_there_are_no_entries(fd):
    last = addr_range((1 << 47) - 4 * PAGE, 8 * PAGE)
    assert len(pagemap.read_entries(fd, last)) < 8
    vsyscall = addr_range(0xFFFFFFFFFF600000, PAGE)
    assert len(pagemap.read_entries(fd, vsyscall)) == 0


def test_entries_are_one_word_a_page(fd):
    with memory_of_ours(10) as (memory, span):
        memory[4 * PAGE] = 1
        entries = pagemap.read_entries(fd, span)
        assert entries.dtype == np.uint64
        assert [bool(int(entry) & pagemap.PM_PRESENT) for entry in entries] == [
            page == 4 for page in range(10)
        ]
        assert int(entries[4]) & pagemap.PM_MMAP_EXCLUSIVE
        assert not int(entries[4]) & (pagemap.PM_FILE | pagemap.PM_SWAP)
        assert len(pagemap.read_entries(fd, addr_range(span.start, 0))) == 0


def test_a_child_shares_its_pages_until_they_are_written(fd):
    with memory_of_ours(2) as (memory, span):
        memory[0] = memory[PAGE] = 1
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(read_end, 1)
            os._exit(0)
        memory[PAGE] = 2
        exclusive = [
            bool(int(entry) & pagemap.PM_MMAP_EXCLUSIVE) for entry in pagemap.read_entries(fd, span)
        ]
        os.write(write_end, b"x")
        os.waitpid(child, 0)
        os.close(read_end)
        os.close(write_end)
        assert exclusive == [False, True]


def test_soft_dirty_is_what_the_probe_says(features):
    code = """
        memory = private_memory(4)
        memory[0] = memory[PAGE] = 1
        say(address_of(memory))
        wait()
        memory[PAGE] = 2
        memory[3 * PAGE] = 2
        say("written")
        wait()
    """
    with running(code) as child:
        span = addr_range(child.heard()[0], 4 * PAGE)
        clear_soft_dirty(child.pid)
        child.tell()
        child.heard()
        with opened(child.pid) as fd:
            dirty = pagemap.soft_dirty(pagemap.read_entries(fd, span))
            expected = [False, True, False, True] if features.soft_dirty else [False] * 4
            assert dirty.tolist() == expected
            if features.pagemap_scan_soft_dirty:
                assert pagemap.scan_soft_dirty(fd, span) == pagemap.runs_of(dirty, span.start)


def test_what_is_gone():
    with pytest.raises(TargetGone):
        clear_soft_dirty(0x7FFFFFFF)
    with pytest.raises(TargetGone):
        pagemap.open_pagemap(0x7FFFFFFF)


def test_a_zombie_is_gone():
    with ended() as pid, pytest.raises(TargetGone):
        pagemap.open_pagemap(pid)


def words(*entries):
    return np.array(entries, dtype=np.uint64)


def test_predicates_on_entries():
    entries = words(
        0,
        pagemap.PM_PRESENT,
        pagemap.PM_PRESENT | pagemap.PM_FILE,
        pagemap.PM_SWAP | 0x40 | 3,
        pagemap.PM_SWAP | pagemap.PM_UFFD_WP | 0x20 | 0x1F,
        pagemap.PM_SWAP | pagemap.PM_FILE,
        pagemap.PM_PRESENT | pagemap.PM_SOFT_DIRTY | 0x1F,
        pagemap.PM_SOFT_DIRTY,
    )
    populated = [False, True, False, True, False, False, True, False]
    assert pagemap.populated_private(entries).tolist() == populated
    assert pagemap.soft_dirty(entries).tolist() == [False] * 6 + [True, True]


@given(st.lists(st.booleans()), st.integers(0, 2**35))
def test_runs_of_a_mask_are_its_true_pages(mask, first_page):
    start = first_page * PAGE
    runs = pagemap.runs_of(np.array(mask, dtype=bool), start)
    assert pages_of(runs, addr_range(start, 0)) == [i for i, hit in enumerate(mask) if hit]
    ends = [address for run in runs for address in run]
    assert ends == sorted(set(ends))
