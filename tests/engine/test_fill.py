"""Pages of a frame go where they belong, whichever way their mapping is filled."""

import contextlib
import mmap
import os

import pytest

from ckpt.engine.fill import Watched, iter_stored
from ckpt.errors import RestoreFailed
from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.kernel import userfaultfd
from ckpt.kernel.libc import writable_address
from ckpt.kernel.userfaultfd import UFFDIO_REGISTER_MODE_MISSING, UffdFeature
from ckpt.resources.memory import VmaRecord
from ckpt.units import Pid, addr_range

PAGE = mmap.PAGESIZE
FRAME = memoryview(b"".join(bytes([n]) * PAGE for n in range(1, 9)))


@contextlib.contextmanager
def memory(n_pages, watched):
    """Lend our own fresh memory, of which the ranges of pages `watched` are watched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    fd = userfaultfd.create(os.O_CLOEXEC | os.O_NONBLOCK | userfaultfd.UFFD_USER_MODE_ONLY)
    with mmap.mmap(-1, n_pages * PAGE, flags=flags) as room:
        start, _ = writable_address(room)
        spans = [addr_range(start + first * PAGE, n * PAGE) for first, n in watched]
        try:
            userfaultfd.negotiate(fd, UffdFeature(0))
            for span in spans:
                mode = UFFDIO_REGISTER_MODE_MISSING
                userfaultfd.register(fd, span, mode, pid=Pid(os.getpid()))
            yield room, start, Watched(Pid(os.getpid()), fd, spans)
        finally:
            os.close(fd)


def test_a_piece_that_spans_watched_and_other_memory_is_cut():
    with memory(8, [(1, 2), (4, 1)]) as (room, start, watched):
        watched.put(FRAME, [(start, 0, 8 * PAGE)])
        assert bytes(room) == bytes(FRAME)


def test_pieces_go_to_their_places_in_any_order():
    with memory(8, [(0, 4)]) as (room, start, watched):
        pieces = [(start + 6 * PAGE, 0, PAGE), (start + 2 * PAGE, 3 * PAGE, 2 * PAGE)]
        watched.put(FRAME, pieces)
        found = [room[n * PAGE] for n in (2, 3, 6)]
        assert found == [4, 5, 1]
        watched.put(FRAME, [(start, 7 * PAGE, 2 * PAGE // 2)])
        assert room[0] == 8


def test_a_page_that_is_there_already_is_a_failure():
    with memory(4, [(0, 4)]) as (_, start, watched):
        watched.put(FRAME, [(start + PAGE, 0, PAGE)])
        with pytest.raises(RestoreFailed, match="filling memory"):
            watched.put(FRAME, [(start, 0, 4 * PAGE)])


def test_memory_that_is_not_mapped_is_a_failure():
    with memory(2, []) as (_, start, watched), pytest.raises(RestoreFailed, match="no page"):
        watched.put(FRAME, [(0, 0, PAGE), (start, PAGE, PAGE)])


def vma(start, n_pages):
    return VmaRecord(start, start + n_pages * PAGE, 3, False, "", -1, 0, (), "")


def test_what_is_stored_is_counted_by_mapping():
    runs = ResolvedRuns.empty(PAGE)
    runs.append(0x10000, 2, Fate.DATA, 0, 0)
    runs.append(0x13000, 1, Fate.ZERO, 0, 0)
    runs.append(0x14000, 1, Fate.DATA, 0, 2)
    runs.append(0x40000, 3, Fate.ZERO, 0, 0)
    vmas = [vma(0x10000, 8), vma(0x40000, 3)]
    (stored,) = iter_stored(vmas, runs)
    assert (stored.vma, stored.n_bytes, stored.n_runs) == (vmas[0], 3 * PAGE, 2)
