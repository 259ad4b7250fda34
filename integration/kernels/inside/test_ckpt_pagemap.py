"""ckpt's own clearing and reading of soft-dirty bits, compared with the plain one."""

import os

import pytest

from ckpt.kernel import pagemap
from ckpt.kernel.clear_refs import clear_soft_dirty
from ckpt.units import addr_range
from integration.kernels.inside import plain_pagemap
from integration.kernels.inside.plain_pagemap import PAGE

N_PAGES = 64
WRITTEN = {0, 1, 2, 17, 40, 41, 63}


@pytest.fixture
def pagemap_fd(process):
    fd = pagemap.open_pagemap(process.popen.pid)
    yield fd
    os.close(fd)


@pytest.fixture
def written(process):
    """A mapping with written pages, first dirty and then cleared, and some written since."""
    addr = process.map(N_PAGES)
    process.write(addr, range(N_PAGES))
    assert plain_pagemap.read_soft_dirty(process.proc, addr, N_PAGES) == set(range(N_PAGES))
    clear_soft_dirty(process.popen.pid)
    assert plain_pagemap.read_soft_dirty(process.proc, addr, N_PAGES) == set()
    process.write(addr, WRITTEN)
    assert plain_pagemap.read_soft_dirty(process.proc, addr, N_PAGES) == WRITTEN
    return addr


def runs_to_pages(runs, addr):
    return {
        page for start, end in runs for page in range((start - addr) // PAGE, (end - addr) // PAGE)
    }


def test_entries_tell_the_written_pages(pagemap_fd, written):
    entries = pagemap.read_entries(pagemap_fd, addr_range(written, N_PAGES * PAGE))
    runs = pagemap.runs_of(pagemap.soft_dirty(entries), written)
    assert runs_to_pages(runs, written) == WRITTEN


def test_scan_tells_the_same_where_the_kernel_has_it(pagemap_fd, written, kernel_under_test):
    span = addr_range(written, N_PAGES * PAGE)
    if "pagemap_scan" not in kernel_under_test.offers:
        with pytest.raises(OSError, match="Inappropriate ioctl"):
            pagemap.scan_soft_dirty(pagemap_fd, span)
        return
    assert runs_to_pages(pagemap.scan_soft_dirty(pagemap_fd, span), written) == WRITTEN
