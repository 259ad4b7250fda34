"""Pages on their way from a process into a generation: into reused buffers, then to a sink.

Pages move in chunks of some MiB; nothing here runs once per page.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Protocol

import attrs

from ckpt.engine.pages import covered
from ckpt.engine.stream import Copied, Stream
from ckpt.errors import TargetGone
from ckpt.image.pipeline import Release
from ckpt.image.reader import PageReader
from ckpt.kernel import process_vm
from ckpt.kernel.libc import PAGE_SIZE
from ckpt.kernel.procfs import maps
from ckpt.tracker.compare import equal_pages
from ckpt.tracker.spans import Spans, intersect, join, subtract
from ckpt.units import AddrRange, Pid, RemoteAddr

CHUNK_BYTES = 4 << 20
"""How much is read from the target in one go."""
HOLD_BYTES = 64 << 20
"""How much is held in memory until the target runs again; more is compressed while it stands."""
_MADV_POPULATE_WRITE = 23


class Pool:
    """Reusable buffers, touched before the target is stopped: first touch is slow."""

    def __init__(self, want_bytes: int) -> None:
        """Make buffers for about `want_bytes`, at most `HOLD_BYTES` and at least three chunks."""
        n_chunks = min(max(-(-want_bytes // CHUNK_BYTES) + 1, 3), HOLD_BYTES // CHUNK_BYTES)
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(n_chunks):
            self._free.put(_touched_buffer())

    def is_empty(self) -> bool:
        """Tell whether all buffers are in use."""
        return self._free.empty()

    def take(self) -> mmap.mmap:
        """Return a free buffer; waits until one is given back."""
        return self._free.get()

    def give_back(self, buffer: mmap.mmap) -> Callable[[], None]:
        """Return what makes `buffer` free again; may be called in another thread."""
        return lambda: self._free.put(buffer)


def _touched_buffer() -> mmap.mmap:
    """Return memory that is there, in huge pages if they can be had: 20 times as quick to touch."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    buffer = mmap.mmap(-1, CHUNK_BYTES, flags=flags)
    try:
        buffer.madvise(mmap.MADV_HUGEPAGE)
        buffer.madvise(_MADV_POPULATE_WRITE)
    except OSError:
        # A kernel without huge pages, or one before 5.14.
        buffer.close()
        buffer = mmap.mmap(-1, CHUNK_BYTES, flags=flags | mmap.MAP_POPULATE)
    return buffer


class PageSink(Protocol):
    """Where a page stream goes: a generation on its way to disk, or another host."""

    @property
    def page_size(self) -> int:
        """Bytes in a page."""

    def write_pages(self, pages: memoryview | bytes, release: Release | None = None) -> int:
        """Append whole pages; return the ordinal of the first. See `FramePipeline.write`."""

    def drain(self) -> None:
        """Wait until every page is on its way, and no buffer is needed any more."""


@attrs.define(slots=True, eq=False, repr=False)
class _Chunk:
    buffer: mmap.mmap
    len_bytes: int
    pool: Pool

    @property
    def room_bytes(self) -> int:
        return CHUNK_BYTES - self.len_bytes


class Copy:
    """The pages of one generation's page stream: some while the target runs, some after.

    `read_running` or `read_whole` fill buffers, `store_all` hands them to the writer.
    """

    def __init__(self, sink: PageSink) -> None:
        """Begin at the first page of the stream."""
        self._sink = sink
        self._read: list[_Chunk] = []
        self.stream = Stream()
        """What was read, in the order of the page stream."""

    def read_running(
        self, space: str, pid: Pid, wanted: Spans, pool: "Pool", *, gently: bool = False
    ) -> Spans:
        """Read what is still there of `wanted`, and return what was read.

        With `gently` what is shared on write stays so, see `sharing.Found.left_of`.

        All of it has been handed to the sink when this returns, and compressed.
        """
        spans: Spans = []
        self.stream.append(Copied(space, spans))
        for ranges in iter_chunks(wanted):
            buffer = pool.take()
            kept, len_bytes = _read_what_is_there(pid, ranges, buffer, gently=gently)
            spans += kept
            self._read.append(_Chunk(buffer, len_bytes, pool))
            self.store_all()
        self._sink.drain()
        return join(spans)

    def read_whole(
        self,
        space: str,
        pid: Pid,
        wanted: Spans,
        pool: "Pool",
        drop: "DropEqual | None" = None,
        *,
        gently: bool = False,
    ) -> Spans:
        """Read all of `wanted`, of a process that stands still, but what `drop` finds unchanged.

        With `gently` what is shared on write stays so, see `sharing.Found.left_of`.

        More than `pool` holds is handed on and compressed meanwhile. Returns what was read.

        Raises:
            TargetGone: the process ended.
        """
        spans: Spans = []
        self.stream.append(Copied(space, spans))
        room = self._read[-1].room_bytes if self._read else 0
        for ranges in iter_chunks(wanted, room or CHUNK_BYTES):
            chunk = self._open(pool, sum(span.len_bytes for span in ranges))
            view = memoryview(chunk.buffer)[chunk.len_bytes :]
            len_bytes = read_all(pid, ranges, view, gently=gently)
            kept: Iterable[tuple[int, int]] = ((span.start, span.end) for span in ranges)
            if drop is not None:
                kept, len_bytes = drop.compact(ranges, view[:len_bytes])
            spans += kept
            chunk.len_bytes += len_bytes
        return join(spans)

    def _open(self, pool: "Pool", need_bytes: int) -> _Chunk:
        """Return a chunk with room for so much: that of a process before, or a new one.

        Many small processes share one, so that they do not use up the pool.
        """
        if not self._read or self._read[-1].room_bytes < need_bytes:
            if pool.is_empty():
                self.store_all()
            self._read.append(_Chunk(pool.take(), 0, pool))
        return self._read[-1]

    def store_other(self, space: str, spans: Spans, pages: bytes) -> int:
        """Hand pages of a page space to the sink that were not read here.

        Returns:
            The ordinal of the first in the page stream.
        """
        self.store_all()
        self.stream.append(Copied(space, spans))
        return self._sink.write_pages(pages)

    @property
    def page_size(self) -> int:
        """Bytes in a page."""
        return self._sink.page_size

    def store_all(self) -> None:
        """Hand everything that was read to the sink."""
        for chunk in self._read:
            release = chunk.pool.give_back(chunk.buffer)
            if not chunk.len_bytes:
                # All of it was found to be what the parent holds, or is gone.
                release()
                continue
            self._sink.write_pages(memoryview(chunk.buffer)[: chunk.len_bytes], release)
        self._read.clear()


def read_all(
    pid: Pid, ranges: Sequence[AddrRange], into: memoryview, *, gently: bool = False
) -> int:
    """Read ranges in full: by process_vm_readv, and by /proc/PID/mem what that refuses.

    State:  the process stands still. Safe in any thread.

    Raises:
        TargetGone: not all of it is there.
    """
    wanted = sum(span.len_bytes for span in ranges)
    done = 0 if gently else process_vm.readv(pid, ranges, into)
    if done < wanted:
        # PROT_NONE and write-only memory is still memory.
        rest = list(_after(ranges, done))
        done += process_vm.read_mem(pid, rest, into[done:])
    if done < wanted:
        raise TargetGone(pid)
    return done


def _read_what_is_there(
    pid: Pid, ranges: Sequence[AddrRange], into: mmap.mmap, *, gently: bool
) -> tuple[Spans, int]:
    """Read the ranges of a running target; what it has unmapped meanwhile is left out.

    Returns:
        The spans that were read, one after the other in `into`, and their bytes.
    """
    kept: Spans = []
    at = 0
    while ranges:
        view = memoryview(into)[at:]
        done = (process_vm.read_mem if gently else process_vm.readv)(pid, ranges, view)
        if not done and not gently:
            done = process_vm.read_mem(pid, ranges[:1], view)
        kept += _before(ranges, done)
        at += done
        ranges = list(_after(ranges, done))
        if ranges and not done:
            ranges = _still_mapped(pid, list(_after(ranges, PAGE_SIZE)))
    return kept, at


def _still_mapped(pid: Pid, ranges: Sequence[AddrRange]) -> list[AddrRange]:
    mapped = join((vma.span.start, vma.span.end) for vma in maps.read_maps(pid))
    here = intersect([(span.start, span.end) for span in ranges], mapped)
    return [AddrRange(RemoteAddr(start), RemoteAddr(end)) for start, end in here]


def _before(ranges: Iterable[AddrRange], len_bytes: int) -> Spans:
    """Return the first `len_bytes` of ranges."""
    spans: Spans = []
    for span in ranges:
        if len_bytes <= 0:
            break
        spans.append((span.start, min(span.end, span.start + len_bytes)))
        len_bytes -= span.len_bytes
    return spans


def _after(ranges: Iterable[AddrRange], skip_bytes: int) -> Iterator[AddrRange]:
    for span in ranges:
        skipped = min(skip_bytes, span.len_bytes)
        skip_bytes -= skipped
        if skipped < span.len_bytes:
            yield AddrRange(RemoteAddr(span.start + skipped), span.end)


def iter_chunks(spans: Spans, first_bytes: int = CHUNK_BYTES) -> Iterator[list[AddrRange]]:
    """Cut spans into lists of ranges of together at most `CHUNK_BYTES`, the first `first_bytes`."""
    ranges: list[AddrRange] = []
    room = first_bytes
    for start, end in spans:
        while start < end:
            stop = min(end, start + room)
            ranges.append(AddrRange(RemoteAddr(start), RemoteAddr(stop)))
            room -= stop - start
            start = stop
            if not room:
                yield ranges
                ranges, room = [], CHUNK_BYTES
    if ranges:
        yield ranges


class DropEqual:
    """Leaves out the pages that are, byte for byte, what the parent generation holds."""

    def __init__(self, reader: PageReader, space: str) -> None:
        """Compare with what `reader` reads of `space`."""
        self._reader = reader
        self._space = space
        self._covered = covered(reader.manifest.spaces[space])
        self._page_size = reader.manifest.page_size

    def compact(self, ranges: list[AddrRange], pages: memoryview) -> tuple[Spans, int]:
        """Move the pages that differ to the front of `pages`; return their spans, their bytes."""
        size = self._page_size
        kept: Spans = []
        end_bytes = 0
        at = 0
        for span in ranges:
            now = pages[at : at + span.len_bytes]
            for start, end in self._differing(span, now):
                offset = at + start - span.start
                piece = bytes(pages[offset : offset + end - start])
                pages[end_bytes : end_bytes + len(piece)] = piece
                end_bytes += len(piece)
                kept.append((start, end))
            at += span.len_bytes
        assert end_bytes % size == 0
        return kept, end_bytes

    def _differing(self, span: AddrRange, now: memoryview) -> Spans:
        whole = [(int(span.start), int(span.end))]
        known = intersect(whole, self._covered)
        differing = subtract(whole, known)
        for start, end in known:
            part = AddrRange(RemoteAddr(start), RemoteAddr(end))
            before = self._reader.read(self._space, part)
            here = now[start - span.start : end - span.start]
            size = self._page_size
            equal = equal_pages(here, memoryview(before), size)
            differing += [
                (start + index * size, start + (index + 1) * size)
                for index, same in enumerate(equal)
                if not same
            ]
        return join(differing)
