"""The promise: pages reach the image as they were, in order, in bounded memory."""

import ctypes
import mmap
import os
import resource
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.copying import (
    CHUNK_BYTES,
    HOLD_BYTES,
    Copy,
    DropEqual,
    Pool,
    iter_chunks,
)
from ckpt.engine.pages import build_runs
from ckpt.engine.stream import Copied, Stream, find_newest
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate
from ckpt.tracker.spans import join, subtract
from ckpt.units import AddrRange, Pid, RemoteAddr
from tests.engine.memory_model import by_page, memory, pages, vma
from tests.image.chain_model import (
    PAGE,
    add_generation,
    data,
    hard_page,
    new_chain,
    parent,
    soft_page,
    zero,
)

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p

# -- moving pages ----------------------------------------------------------------------------------

lengths = st.lists(st.tuples(st.integers(1, 900), st.integers(0, 5)), max_size=8)


@given(lengths)
def test_chunks_are_full_and_in_order(sizes):
    spans, at = [], 0
    for n_pages, gap in sizes:
        spans.append((at * PAGE, (at + n_pages) * PAGE))
        at += n_pages + gap
    chunks = list(iter_chunks(spans))
    flat = [(span.start, span.end) for chunk in chunks for span in chunk]
    assert join(flat) == join(spans)
    assert flat == sorted(flat)
    totals = [sum(span.len_bytes for span in chunk) for chunk in chunks]
    assert all(total == CHUNK_BYTES for total in totals[:-1])
    assert all(0 < total <= CHUNK_BYTES for total in totals)


@pytest.mark.parametrize(
    ("wanted", "n_buffers"),
    [(0, 3), (1, 3), (3 * CHUNK_BYTES, 4), (10 * HOLD_BYTES, HOLD_BYTES // CHUNK_BYTES)],
)
def test_a_pool_is_bounded(wanted, n_buffers):
    pool = Pool(wanted)
    buffers = [pool.take() for _ in range(n_buffers)]
    assert all(len(buffer) == CHUNK_BYTES for buffer in buffers)
    assert pool.is_empty()
    pool.give_back(buffers[0])()
    assert not pool.is_empty()
    assert pool.take() is buffers[0]


@pytest.mark.parametrize("advice", [23, 9999])
def test_the_memory_of_a_pool_is_there_also_on_a_kernel_before_the_advice(monkeypatch, advice):
    monkeypatch.setattr("ckpt.engine.copying._MADV_POPULATE_WRITE", advice)
    buffer = Pool(0).take()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for at in range(0, CHUNK_BYTES, PAGE):
        buffer[at] = 1
    n_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert n_faults < CHUNK_BYTES // PAGE // 8


class Mapped:
    """Pages of this very process, for a copy that reads a process."""

    def __init__(self, content):
        self._map = mmap.mmap(-1, max(len(content), PAGE))
        self._map[: len(content)] = content
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))


def test_more_than_the_pool_holds_is_copied_too(tmp_path):
    """The buffers go round: what they held is in the image, in order, when they are filled again.

    The target is this process: its memory is read like any other's.
    """
    content = b"".join(
        hard_page(n % 7) + soft_page(n) * 3 for n in range(4 * CHUNK_BYTES // 4 // PAGE)
    )
    mapped = Mapped(content)
    span = (mapped.start, mapped.start + len(content))
    first = mapped.start // PAGE
    chain = new_chain(tmp_path / "chain")
    with chain.lock(), chain.begin(None) as writer:
        copy = Copy(writer)
        copy.read_whole("mm-1", Pid(os.getpid()), [span], Pool(0))
        copy.store_all()
        record = memory(vma(first, first + len(content) // PAGE))
        table = build_runs(record, find_newest(copy.stream, "mm-1", [span], PAGE), [], PAGE)
        writer.commit(spaces={"mm-1": table}, records={}, host={}, tracker="full")
    read = PageReader(chain, 0).read("mm-1", AddrRange(*map(RemoteAddr, span)))
    assert bytes(read) == content


def test_small_processes_share_buffers(tmp_path):
    """More of them than the pool has buffers: nothing is compressed before they run again."""
    n_spaces, n_pages = 20, 7
    content = b"".join(hard_page(n) for n in range(n_spaces * n_pages))
    mapped = Mapped(content)
    chain = new_chain(tmp_path / "chain")
    with chain.lock(), chain.begin(None) as writer:
        copy, pool = Copy(writer), Pool(0)
        spans = {}
        for n in range(n_spaces):
            at = mapped.start + n * n_pages * PAGE
            # Backwards: the order of the stream is that of reading, not that of addresses.
            wanted = [(at, at + 3 * PAGE), (at + 4 * PAGE, at + n_pages * PAGE)]
            spans[f"mm-{n_spaces - n}"] = wanted
            copy.read_whole(f"mm-{n_spaces - n}", Pid(os.getpid()), wanted, pool)
            assert not pool.is_empty()
        copy.store_all()
        tables = {}
        for space, wanted in spans.items():
            first = wanted[0][0] // PAGE
            copies = find_newest(copy.stream, space, wanted, PAGE)
            tables[space] = build_runs(memory(vma(first, first + n_pages)), copies, [], PAGE)
        writer.commit(spaces=tables, records={}, host={}, tracker="full")
    stored = PageReader(chain, 0)
    for space, wanted in spans.items():
        for start, end in wanted:
            at = start - mapped.start
            read = stored.read(space, AddrRange(RemoteAddr(start), RemoteAddr(end)))
            assert bytes(read) == content[at : at + end - start]


def protect(mapped, n_pages, prot):
    assert LIBC.mprotect(ctypes.c_void_p(mapped.start), n_pages * PAGE, prot) == 0


def test_what_a_running_process_has_unmapped_is_left_out(tmp_path):
    """And what it may not read itself is read: pages in the order in which they were asked for."""
    content = b"".join(hard_page(n) for n in range(40))
    mapped = Mapped(content)
    span = (mapped.start, mapped.start + len(content))
    protect(mapped, 3, 0)
    gone = mapped.start + 10 * PAGE
    assert LIBC.munmap(ctypes.c_void_p(gone), 20 * PAGE) == 0
    chain = new_chain(tmp_path / "chain")
    with chain.lock(), chain.begin(None) as writer:
        copy = Copy(writer)
        read = copy.read_running("mm-1", Pid(os.getpid()), [span], Pool(0))
        assert read == [(span[0], gone), (gone + 20 * PAGE, span[1])]
        first = mapped.start // PAGE
        record = memory(vma(first, first + 10), vma(first + 30, first + 40))
        table = build_runs(record, find_newest(copy.stream, "mm-1", read, PAGE), [], PAGE)
        writer.commit(spaces={"mm-1": table}, records={}, host={}, tracker="full")
    stored = PageReader(chain, 0)
    for start, end in read:
        at = start - span[0]
        wanted = content[at : at + end - start]
        assert bytes(stored.read("mm-1", AddrRange(RemoteAddr(start), RemoteAddr(end)))) == wanted
    # Python unmaps all of it in the end.
    LIBC.mmap(ctypes.c_void_p(gone), 20 * PAGE, 3, 0x32, -1, 0)


# -- comparing -------------------------------------------------------------------------------------

BASE = 0x10


@pytest.fixture
def chain_of_two(tmp_path):
    """Return a chain, and what generation 1 holds: page -> content, from both generations."""
    chain = new_chain(tmp_path / "chain")
    first = [soft_page(n) for n in range(6)]
    second = [soft_page(100), hard_page(101)]
    add_generation(chain, {"mm-1": [data(BASE, *first), zero(BASE + 6, 4)]})
    runs = [
        parent(BASE, 2),
        data(BASE + 2, *second),
        parent(BASE + 4, 2),
        zero(BASE + 6, 4),
    ]
    add_generation(chain, {"mm-1": runs}, parent=0)
    held = first[:2] + second + first[4:]
    return chain, {BASE + n: content for n, content in enumerate(held)}


CHANGES = {
    "as it was": lambda content: content,
    "first byte": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "last byte": lambda content: content[:-1] + bytes([content[-1] ^ 0x80]),
    "zero": lambda _: bytes(PAGE),
}


@pytest.mark.parametrize("n_ranges", [1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
def test_only_what_differs_from_the_parent_is_kept(chain_of_two, seed, n_ranges):
    """Pages that the parent does not hold differ by that alone, even where they read as zeros."""
    chain, held = chain_of_two
    names = list(CHANGES)
    now = {}
    for page in range(BASE, BASE + 10):
        before = held.get(page, bytes(PAGE))
        now[page] = CHANGES[names[(page * 7 + seed * 5) % len(names)]](before)
    whole = sorted(now)
    size = -(-len(whole) // n_ranges)
    ranges = [
        AddrRange(RemoteAddr(part[0] * PAGE), RemoteAddr((part[-1] + 1) * PAGE))
        for part in (whole[i : i + size] for i in range(0, len(whole), size))
    ]
    buffer = memoryview(bytearray(b"".join(now[page] for page in whole)))
    drop = DropEqual(PageReader(chain, 1), "mm-1")
    kept, len_bytes = drop.compact(ranges, buffer)
    differs = [page for page in whole if now[page] != held.get(page)]
    assert pages(kept) == set(differs)
    assert kept == sorted(kept)
    assert bytes(buffer[:len_bytes]) == b"".join(now[page] for page in differs)
    populated = [(BASE * PAGE, (BASE + 10) * PAGE)]
    unchanged = subtract(populated, join(kept))
    assert pages(unchanged) == set(whole) - set(differs)
    assert pages(unchanged) <= held.keys(), "what is left to the parent, it has"


def test_a_delta_by_comparison_reads_back(chain_of_two):
    """From the comparison to the image and back: every page is what it was in memory."""
    chain, held = chain_of_two
    now = {page: held.get(page, bytes(PAGE)) for page in range(BASE, BASE + 10)}
    now[BASE + 3] = soft_page(200)
    now[BASE + 8] = hard_page(201)
    content = b"".join(now[page] for page in sorted(now))
    span = AddrRange(RemoteAddr(BASE * PAGE), RemoteAddr((BASE + 10) * PAGE))
    reader = PageReader(chain, 1)
    drop = DropEqual(reader, "mm-1")
    buffer = memoryview(bytearray(content))
    kept, len_bytes = drop.compact([span], buffer)
    populated = [(span.start, span.end)]
    with chain.lock(), chain.begin(1, page_size=PAGE) as writer:
        writer.write_pages(bytes(buffer[:len_bytes]))
        unchanged = subtract(populated, join(kept))
        copies = find_newest(Stream([Copied("mm-1", kept)]), "mm-1", kept, PAGE)
        table = build_runs(memory(vma(BASE, BASE + 10)), copies, unchanged, PAGE)
        writer.commit(spaces={"mm-1": table}, records={}, host={}, tracker="compare")
    assert bytes(PageReader(chain, 2).read("mm-1", span)) == content
    fates = Counter(fate for fate, _ in by_page(chain.manifest(2).spaces["mm-1"]).values())
    # Four that the parent does not hold are stored, though three of them are zeros.
    assert fates == {Fate.DATA: 5, Fate.PARENT: 5}
