"""Properties of memory that one call gives and no content shows: they come back, or are refused."""

import contextlib
import ctypes
import mmap
import os
import signal

import pytest

from ckpt.kernel.procfs.maps import read_smaps
from integration.files.processes import opened_by
from integration.harness import become_subreaper, ckpt, dump
from integration.resources.droppable import MAP_DROPPABLE, can_be_dropped
from integration.resources.embryos import FEATURES

PAGE = mmap.PAGESIZE
AT = 0x2345_6000_0000
MADV_GUARD_INSTALL = 102
MAP_FIXED, MAP_ANONYMOUS, MAP_PRIVATE = 0x10, 0x20, 0x02
NR_MSEAL = 462
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.madvise.argtypes = libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.syscall.argtypes = [ctypes.c_long] * 4


def succeed(result):
    if result == -1 or result == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def map_pages(n_pages, kind=MAP_PRIVATE):
    succeed(libc.mmap(AT, n_pages * PAGE, 3, kind | MAP_ANONYMOUS | MAP_FIXED, -1, 0))
    for page in range(n_pages):
        ctypes.memset(AT + page * PAGE, page + 1, PAGE)


def guard(page, n_pages=1):
    succeed(libc.madvise(AT + page * PAGE, n_pages * PAGE, MADV_GUARD_INSTALL))


def content(pid, n_pages):
    """Return the first byte of each page, None of a page that may not be touched."""
    pages = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for page in range(n_pages):
            memory.seek(AT + page * PAGE)
            try:
                pages.append(memory.read(1)[0])
            except OSError:
                pages.append(None)
    return pages


def flags_at(pid):
    (vma,) = [vma for vma in read_smaps(pid) if vma.span.start == AT]
    return vma.flags - {"sd", "uw"}  # of the trackers


@contextlib.contextmanager
def brought_back(pid, image):
    """Restore what was killed; kill it again."""
    os.waitpid(pid, 0)
    done = ckpt("restore", "--detach", image)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def _subreaper():
    become_subreaper()


guards = pytest.mark.skipif(not FEATURES.pagemap_scan_guard, reason="kernel shows no guard regions")


@guards
def test_guard_regions_stay_where_they_are_and_come_back(tmp_path):
    def prepare():
        map_pages(9)
        guard(0)
        guard(3, 2)
        guard(8)

    expected = [None, 2, 3, None, None, 6, 7, 8, None]
    with opened_by(prepare) as pid:
        assert content(pid, 9) == expected
        dump(pid, tmp_path / "image")
        assert content(pid, 9) == expected
        dump(pid, tmp_path / "image")
        dump(pid, tmp_path / "image", "--kill")
        with brought_back(pid, tmp_path / "image"):
            assert content(pid, 9) == expected


@guards
def test_guard_regions_of_locked_read_only_memory_come_back(tmp_path):
    def prepare():
        map_pages(4)
        guard(2)
        libc.mlock(AT, 4 * PAGE)  # ENOMEM: it cannot touch the guard; locked all the same
        succeed(libc.mprotect(AT, 4 * PAGE, 1))

    with opened_by(prepare) as pid:
        before = flags_at(pid)
        assert "lo" in before
        dump(pid, tmp_path / "image", "--kill")
        with brought_back(pid, tmp_path / "image"):
            assert content(pid, 4) == [1, 2, None, 4]
            assert flags_at(pid) == before


@pytest.mark.skipif(not FEATURES.mseal, reason="kernel has no mseal")
def test_sealed_memory_is_sealed_again(tmp_path):
    def prepare():
        map_pages(2)
        succeed(libc.syscall(NR_MSEAL, AT, 2 * PAGE, 0))

    with opened_by(prepare) as pid:
        dump(pid, tmp_path / "image", "--kill")
        with brought_back(pid, tmp_path / "image"):
            assert "sl" in flags_at(pid)
            assert content(pid, 2) == [1, 2]


def map_droppable():
    map_pages(2, MAP_DROPPABLE)


@pytest.mark.skipif(not can_be_dropped(), reason="kernel has no droppable memory")
def test_droppable_memory_is_droppable_again(tmp_path):
    with opened_by(map_droppable) as pid:
        before = flags_at(pid)
        assert "dp" in before
        dump(pid, tmp_path / "image", "--kill")
        with brought_back(pid, tmp_path / "image"):
            assert flags_at(pid) == before
