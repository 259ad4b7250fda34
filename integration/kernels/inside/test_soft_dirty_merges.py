"""Mappings that are merged lose the mark that they are dirty: the write that bit 55 never tells.

`ckpt.tracker.layout` tells why. The first test pins the kernel down; the second, that our tracker
does not believe it.
"""

import mmap

import pytest

from ckpt import probe_features
from ckpt.kernel import clear_refs
from ckpt.tracker.softdirty import SoftDirty
from ckpt.tracker.spans import Own
from ckpt.units import Pid
from integration.kernels.inside.plain_pagemap import PAGE, read_soft_dirty

N_PAGES = 64
WRITTEN = 20
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


@pytest.fixture
def area(process):
    """64 written pages, of which the 41st to 44th are a mapping of their own: read-only."""
    addr = process.map(N_PAGES)
    process.write(addr, range(N_PAGES))
    process.protect(addr + 40 * PAGE, 4, mmap.PROT_READ)
    yield addr
    process.unmap(addr, N_PAGES)


def write_unseen(process, addr):
    """Write a page such that no bit is set, and let the mapping lose its mark by a merge."""
    process.unmap(addr, 4)
    assert process.map(4, addr) == addr
    for protection in (mmap.PROT_READ, READ_WRITE):
        process.protect(addr + WRITTEN * PAGE, 4, protection)
    process.write(addr, [WRITTEN])
    process.protect(addr + 40 * PAGE, 4, READ_WRITE)


def test_a_written_page_of_mappings_that_were_merged_reads_as_clean(process, area):
    clear_refs.clear_soft_dirty(process.popen.pid)
    write_unseen(process, area)
    assert WRITTEN not in read_soft_dirty(process.proc, area, N_PAGES)


def test_the_tracker_believes_no_mapping_that_was_merged(process, area):
    pid, tracker = Pid(process.popen.pid), SoftDirty(probe_features())
    own = Own([(area, area + N_PAGES * PAGE)], [])
    tracker.collect(pid, own, [])
    assert tracker.collect(pid, own, []).clean == own.anonymous
    write_unseen(process, area)
    assert tracker.collect(pid, own, []).clean == []
