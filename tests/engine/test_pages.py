"""The promise: each page of each mapping gets the fate that page-by-page reasoning gives it."""

import ctypes
import mmap
import os
import resource
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.pages import (
    CHUNK_BYTES,
    HOLD_BYTES,
    Copy,
    DropEqual,
    Pool,
    build_runs,
    covered,
    iter_chunks,
    own_mappings,
    split,
    untrusted_spans,
)
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate
from ckpt.resources.file_identity import FileIdentity
from ckpt.resources.memory import MemoryRecord, MmFields, VmaRecord
from ckpt.tracker.base import Scan
from ckpt.tracker.spans import join
from ckpt.units import AddrRange, Pid, RemoteAddr
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


def vma(start, end, *, file=-1, shared=False, special="", flags=()):
    """Return a mapping of the pages from `start` to `end`."""
    return VmaRecord(
        start=start * PAGE,
        end=end * PAGE,
        prot=3,
        shared=shared,
        special=special,
        file=file,
        offset_bytes=0,
        flags=tuple(flags),
        name="",
    )


def memory(*vmas):
    file = FileIdentity("/x", 0, 0)
    return MemoryRecord(tuple(vmas), (file,), MmFields(*[0] * 11), file, b"", "")


def pages(spans):
    """Return the page numbers in spans."""
    return {page for start, end in spans for page in range(start // PAGE, end // PAGE)}


def spans_of(numbers):
    return join((page * PAGE, (page + 1) * PAGE) for page in numbers)


# -- which pages -----------------------------------------------------------------------------------


def test_own_pages_are_those_of_private_mappings():
    record = memory(
        vma(1, 3),
        vma(3, 5, file=0),
        vma(6, 7, file=0, shared=True),
        vma(8, 9, special="[vdso]"),
        vma(10, 12),
    )
    assert own_mappings(record).all == [(1 * PAGE, 5 * PAGE), (10 * PAGE, 12 * PAGE)]


def test_mergeable_memory_is_not_trusted_to_a_tracker():
    record = memory(vma(1, 3), vma(3, 5, flags=["rd", "mg"]), vma(6, 7, flags=["mg"]))
    assert untrusted_spans(record) == [(3 * PAGE, 5 * PAGE), (6 * PAGE, 7 * PAGE)]


numbers = st.sets(st.integers(0, 30))


@given(numbers, numbers, numbers)
def test_a_page_is_left_to_the_parent_only_if_clean_and_there(populated, unwritten, there):
    clean = populated & unwritten
    parts = split(Scan(spans_of(populated), spans_of(clean)), spans_of(there))
    assert pages(parts.parent) == clean & there
    assert pages(parts.data) == populated - (clean & there)


# -- the run table ---------------------------------------------------------------------------------


@st.composite
def address_spaces(draw):
    """Return a memory record, and of its own pages those stored and those left to the parent."""
    vmas = []
    at = 0
    for _ in range(draw(st.integers(0, 5))):
        at += draw(st.integers(0, 2))  # 0: it touches the one before
        end = at + draw(st.integers(1, 6))
        kind = draw(st.sampled_from(["anonymous", "file", "shared", "[vdso]"]))
        vmas.append(
            vma(
                at,
                end,
                file=0 if kind in ("file", "shared") else -1,
                shared=kind == "shared",
                special=kind if kind == "[vdso]" else "",
            )
        )
        at = end
    record = memory(*vmas)
    own = sorted(pages(own_mappings(record).all))
    fates = draw(st.lists(st.sampled_from("dp-"), min_size=len(own), max_size=len(own)))
    chosen = dict(zip(own, fates, strict=True))
    stored = {page for page, fate in chosen.items() if fate == "d"}
    left = {page for page, fate in chosen.items() if fate == "p"}
    return record, stored, left


def by_page(table):
    """Return page -> (fate, source) of a run table."""
    result = {}
    for run in table:
        for n in range(run.n_pages):
            page = run.start // PAGE + n
            assert page not in result
            result[page] = (run.fate, run.source + n if run.fate == Fate.DATA else None)
    return result


def by_reasoning(record, stored, left):
    """Say for each page what must become of it, one at a time."""
    order = {page: index for index, page in enumerate(sorted(stored))}
    result = {}
    for one in record.vmas:
        for page in range(one.start // PAGE, one.end // PAGE):
            if one.special:
                continue
            if page in stored:
                result[page] = (Fate.DATA, order[page])
            elif page in left:
                result[page] = (Fate.PARENT, None)
            else:
                result[page] = (Fate.FILE if one.file >= 0 else Fate.ZERO, None)
    return result


@given(address_spaces())
def test_every_page_of_every_mapping_has_the_right_fate(space):
    record, stored, left = space
    table = build_runs(record, spans_of(stored), spans_of(left), PAGE)
    assert by_page(table) == by_reasoning(record, stored, left)
    table.validate(len(stored), parent_allowed=True)


@given(address_spaces(), st.data())
def test_spans_may_be_cut_anywhere(space, drawn):
    """Pages arrive in chunks: a span that was cut is no other span."""
    record, stored, left = space
    pieces = []
    for start, end in spans_of(stored):
        cut = drawn.draw(st.integers(start // PAGE, end // PAGE)) * PAGE
        pieces += [piece for piece in ((start, cut), (cut, end)) if piece[0] < piece[1]]
    table = build_runs(record, pieces, spans_of(left), PAGE)
    assert by_page(table) == by_reasoning(record, stored, left)


@given(address_spaces())
def test_what_a_table_covers_are_its_pages_with_content(space):
    record, stored, left = space
    table = build_runs(record, spans_of(stored), spans_of(left), PAGE)
    assert pages(covered(table)) == stored | left


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
    monkeypatch.setattr("ckpt.engine.pages._MADV_POPULATE_WRITE", advice)
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
        copy = Copy(Pid(os.getpid()), writer, Pool(0))
        copy.read_all([span])
        copy.store_all()
        record = memory(vma(first, first + len(content) // PAGE))
        table = build_runs(record, copy.stored, [], PAGE)
        writer.commit(spaces={"mm-1": table}, records={}, host={}, tracker="full")
    read = PageReader(chain, 0).read("mm-1", AddrRange(*map(RemoteAddr, span)))
    assert bytes(read) == content


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
    unchanged = drop.unchanged(populated, kept)
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
        table = build_runs(
            memory(vma(BASE, BASE + 10)), kept, drop.unchanged(populated, kept), PAGE
        )
        writer.commit(spaces={"mm-1": table}, records={}, host={}, tracker="compare")
    assert bytes(PageReader(chain, 2).read("mm-1", span)) == content
    fates = Counter(fate for fate, _ in by_page(chain.manifest(2).spaces["mm-1"]).values())
    # Four that the parent does not hold are stored, though three of them are zeros.
    assert fates == {Fate.DATA: 5, Fate.PARENT: 5}
