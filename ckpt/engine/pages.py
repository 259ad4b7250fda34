"""The pages of a dump: which are stored, copied out of the frozen target, and what the image says.

    VMA            | anonymous                                  | file mapping      |
    populated        ######    ########   ######                       ####
    clean            ###         ####                                  ##
    in the parent    #####       ####     ######                       ####
    fate             PPPDDDZZZZDDPPPPDDZZZDDDDDD                 FFFFFFPPDDFFFFFF

Nothing here runs once per page: pages move in chunks of some MiB, fates in runs.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue

import attrs

from ckpt.errors import TargetGone
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate, RunTable, RunTableBuilder
from ckpt.image.writer import GenerationWriter
from ckpt.kernel import process_vm
from ckpt.resources.memory import MemoryRecord
from ckpt.tracker.base import Scan
from ckpt.tracker.compare import equal_pages
from ckpt.tracker.spans import Own, Spans, intersect, join, subtract
from ckpt.units import AddrRange, Pid, RemoteAddr

CHUNK_BYTES = 4 << 20
"""How much is read from the target in one go."""
HOLD_BYTES = 64 << 20
"""How much is held in memory until the target runs again; more is compressed while it stands."""
_MADV_POPULATE_WRITE = 23


def own_mappings(memory: MemoryRecord) -> Own:
    """Return the mappings whose pages can be the process's own."""
    own = [vma for vma in memory.vmas if vma.has_own_pages]
    return Own(
        anonymous=join((vma.start, vma.end) for vma in own if vma.file < 0),
        mapped=join((vma.start, vma.end) for vma in own if vma.file >= 0),
    )


def untrusted_spans(memory: MemoryRecord) -> Spans:
    """Return the mappings that change without a fault of this address space: mergeable ones.

    Merging equal pages (KSM, MADV_MERGEABLE) drops the soft-dirty bit of the pages.
    """
    return join((vma.start, vma.end) for vma in memory.vmas if "mg" in vma.flags)


def covered(table: RunTable) -> Spans:
    """Return the pages that a generation, with its ancestors, holds the content of.

    Its own table is enough: a page is left to a parent only where that has it (`split`).
    """
    return join(
        (start, start + n * table.page_size)
        for start, n, fate in zip(table.starts, table.n_pages, table.fates, strict=True)
        if fate in (Fate.DATA, Fate.PARENT)
    )


@attrs.frozen(slots=True)
class Split:
    """What becomes of the pages that exist."""

    data: Spans
    """Copied and stored."""
    parent: Spans
    """Unchanged: the parent generation holds them."""


def split(scan: Scan, in_parent: Spans) -> Split:
    """Return what must be copied: a page is left to the parent only if it is clean *and* there."""
    parent = intersect(scan.clean, in_parent)
    return Split(subtract(scan.populated, parent), parent)


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


@attrs.frozen(slots=True)
class _Chunk:
    buffer: mmap.mmap
    len_bytes: int


class Copy:
    """Pages on their way from a frozen process into a generation.

    `read_all` while the target is frozen, `store_all` when it runs again.
    """

    def __init__(self, pid: Pid, writer: GenerationWriter, pool: Pool) -> None:
        """Begin at the first page of the generation's page stream."""
        self._pid = pid
        self._writer = writer
        self._pool = pool
        self._held: list[_Chunk] = []
        self.stored: Spans = []
        """What was read for storing, in the order of the page stream."""

    def read_all(self, data: Spans, drop: "DropEqual | None" = None) -> None:
        """Read `data` out of the target, leaving out what `drop` finds to be unchanged."""
        for ranges in iter_chunks(data):
            buffer = self._take()
            len_bytes = _read(self._pid, ranges, buffer)
            kept: Iterable[tuple[int, int]] = ((span.start, span.end) for span in ranges)
            if drop is not None:
                kept, len_bytes = drop.compact(ranges, memoryview(buffer)[:len_bytes])
            self.stored += kept
            self._held.append(_Chunk(buffer, len_bytes))

    def _take(self) -> mmap.mmap:
        if self._pool.is_empty():
            # More than can be held: the rest is compressed while the target stands.
            self.store_all()
        return self._pool.take()

    def store_all(self) -> None:
        """Hand everything that was read to the writer."""
        for chunk in self._held:
            if not chunk.len_bytes:
                # All of it was found to be what the parent holds.
                self._pool.give_back(chunk.buffer)()
                continue
            view = memoryview(chunk.buffer)[: chunk.len_bytes]
            self._writer.write_pages(view, self._pool.give_back(chunk.buffer))
        self._held.clear()


def _read(pid: Pid, ranges: Sequence[AddrRange], into: mmap.mmap) -> int:
    """Read ranges in full: by process_vm_readv, and by /proc/PID/mem what that refuses."""
    wanted = sum(span.len_bytes for span in ranges)
    done = process_vm.readv(pid, ranges, into)
    if done < wanted:
        # PROT_NONE and write-only memory is still memory.
        rest = list(_after(ranges, done))
        done += process_vm.read_mem(pid, rest, memoryview(into)[done:])
    if done < wanted:
        raise TargetGone(pid)
    return done


def _after(ranges: Iterable[AddrRange], skip_bytes: int) -> Iterator[AddrRange]:
    for span in ranges:
        skipped = min(skip_bytes, span.len_bytes)
        skip_bytes -= skipped
        if skipped < span.len_bytes:
            yield AddrRange(RemoteAddr(span.start + skipped), span.end)


def iter_chunks(spans: Spans) -> Iterator[list[AddrRange]]:
    """Cut spans into lists of ranges of together at most `CHUNK_BYTES`."""
    ranges: list[AddrRange] = []
    room = CHUNK_BYTES
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

    def unchanged(self, populated: Spans, stored: Spans) -> Spans:
        """Return the pages that are left to the parent, once all were compared."""
        return subtract(populated, join(stored))

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


def build_runs(memory: MemoryRecord, stored: Spans, parent: Spans, page_size: int) -> RunTable:
    """Return the run table of one address space: every page of every mapping has a fate.

    Args:
        memory: the mappings.
        stored: pages of this generation's page stream, in its order, which is ascending.
        parent: pages that the parent holds.
        page_size: in bytes.
    """
    builder = RunTableBuilder(page_size)
    fates = sorted(
        [(start, end, Fate.DATA) for start, end in stored]
        + [(start, end, Fate.PARENT) for start, end in parent]
    )
    source = 0
    index = 0
    for vma in memory.vmas:
        if vma.special:
            continue
        rest = Fate.FILE if vma.file >= 0 else Fate.ZERO
        at = vma.start
        while index < len(fates) and fates[index][0] < vma.end:
            start, end, fate = fates[index]
            stop = min(end, vma.end)
            start = max(start, vma.start)
            builder.add(at, (start - at) // page_size, rest)
            n_pages = (stop - start) // page_size
            builder.add(start, n_pages, fate, source if fate is Fate.DATA else 0)
            source += n_pages if fate is Fate.DATA else 0
            at = stop
            if end > vma.end:
                break
            index += 1
        builder.add(at, (vma.end - at) // page_size, rest)
    return builder.build()
