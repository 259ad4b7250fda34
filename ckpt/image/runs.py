"""Page runs: what became of each page of an address space, as packed columns; pure.

A `RunTable` is what one generation says about one page space (an address space, or a shared memory
object). Laying the tables of a chain over one another gives `ResolvedRuns`: the same space with
every `PARENT` replaced by the ancestor that holds the page. Neither has an object per run; a run
becomes an object only when one is asked for.

    addresses        0x1000            0x3000      0x4000   0x5000            0x7000
    generation 1     | DATA            | ZERO      | hole   | PARENT          |
    starts           0x1000              0x3000               0x5000
    n_pages          2                   1                    2
    fates            DATA                ZERO                 PARENT
    sources          0  (page stream)    0                    0
"""

import enum
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, compress, count, islice, repeat
from operator import add, floordiv, gt, sub
from typing import Self

import attrs

from ckpt.image.codec import pack_column, unpack_column
from ckpt.units import AddrRange, GenerationNo, RemoteAddr

ADDRESS_LIMIT = 1 << 64
"""One past the last byte address that a run may cover."""

RUN_BYTES = 8 + 8 + 8 + 1
"""Packed size of one run."""

COUNT_BYTES = 8
"""Packed size of the number of runs."""


class Fate(enum.IntEnum):
    """What became of the pages of a run."""

    PARENT = 0
    """Unchanged: the parent generation says what they hold."""
    DATA = 1
    """Stored in this generation's page stream."""
    ZERO = 2
    """All bytes zero (or never touched); not stored."""
    FILE = 3
    """A page of a file mapping that still is the file's own content; not stored."""


@attrs.frozen(slots=True)
class Run:
    """One run, as an object; for single look-ups and tests, not for walking a big table."""

    start: RemoteAddr
    n_pages: int
    fate: Fate
    source: int
    """Ordinal of the first page in the page stream of its generation; 0 unless `DATA`."""


@attrs.frozen(slots=True)
class ResolvedRun:
    """One run of `ResolvedRuns`; its fate is never `PARENT`."""

    start: RemoteAddr
    n_pages: int
    fate: Fate
    generation: GenerationNo
    source: int


_PARENT, _DATA = int(Fate.PARENT), int(Fate.DATA)
_IS_DATA = bytes(value == Fate.DATA for value in range(256))
_IS_NO_DATA = bytes(value != Fate.DATA for value in range(256))


def _find(starts: "array[int]", n_pages: "array[int]", page_size: int, addr: int) -> int | None:
    """Return the index of the run that holds `addr`."""
    index = bisect_right(starts, addr) - 1
    if index < 0 or addr >= starts[index] + n_pages[index] * page_size:
        return None
    return index


def _totals(fates: "array[int]", n_pages: "array[int]") -> dict[Fate, int]:
    """Return the number of pages of each fate."""
    sums = dict.fromkeys(range(len(Fate)), 0)
    for fate, n in zip(fates, n_pages, strict=True):
        sums[fate] += n
    return {fate: sums[fate] for fate in Fate}


@attrs.frozen(repr=False)
class RunTable:
    """One generation's runs of one page space, ascending and disjoint.

    Attributes:
        page_size: bytes per page.
        starts: byte addresses ('Q').
        n_pages: lengths in pages ('Q').
        fates: `Fate` values ('B').
        sources: ordinal of the run's first page in this generation's page stream ('Q'); 0 unless
            the fate is `DATA`.
    """

    page_size: int
    starts: "array[int]"
    n_pages: "array[int]"
    fates: "array[int]"
    sources: "array[int]"

    @classmethod
    def empty(cls, page_size: int) -> Self:
        """Make the table of a space without any mapping."""
        return cls(page_size, array("Q"), array("Q"), array("B"), array("Q"))

    def __len__(self) -> int:
        """Number of runs."""
        return len(self.starts)

    def __iter__(self) -> Iterator[Run]:
        """Walk the runs as objects, ascending."""
        for start, n, fate, source in zip(
            self.starts, self.n_pages, self.fates, self.sources, strict=True
        ):
            yield Run(RemoteAddr(start), n, Fate(fate), source)

    def lookup(self, addr: RemoteAddr) -> Run | None:
        """Return the whole run that holds `addr`, or None where the space has a hole."""
        index = _find(self.starts, self.n_pages, self.page_size, addr)
        if index is None:
            return None
        return Run(
            RemoteAddr(self.starts[index]),
            self.n_pages[index],
            Fate(self.fates[index]),
            self.sources[index],
        )

    def totals(self) -> dict[Fate, int]:
        """Return the number of pages of each fate; every fate has an entry."""
        return _totals(self.fates, self.n_pages)

    def pack(self) -> bytes:
        """Encode as specified in images/FORMAT.md, "Run table"; the page size is not in it."""
        return b"".join(
            (
                len(self).to_bytes(COUNT_BYTES, "little"),
                pack_column(self.starts),
                pack_column(self.n_pages),
                pack_column(self.sources),
                pack_column(self.fates),
            )
        )

    @classmethod
    def unpack(cls, data: bytes | memoryview, page_size: int) -> Self:
        """Decode what `pack` made; `validate` is a step of its own.

        Raises:
            ValueError: the number of runs does not fit the bytes.
        """
        n_runs = int.from_bytes(data[:COUNT_BYTES], "little")
        if len(data) != COUNT_BYTES + n_runs * RUN_BYTES:
            raise ValueError(f"a run table of {len(data)} bytes cannot hold {n_runs} runs")
        view = memoryview(data)[COUNT_BYTES:]
        wide = n_runs * 8
        return cls(
            page_size,
            unpack_column("Q", view[:wide]),
            unpack_column("Q", view[wide : 2 * wide]),
            unpack_column("B", view[3 * wide :]),
            unpack_column("Q", view[2 * wide : 3 * wide]),
        )

    def validate(self, n_stream_pages: int, *, parent_allowed: bool) -> None:
        """Check everything that can be checked without the ancestors.

        Args:
            n_stream_pages: how many pages this generation's page stream has.
            parent_allowed: False for a full generation.

        Raises:
            ValueError: the columns differ in length; a run is empty, unaligned, out of order or
                beyond the address space; a fate is unknown; a source is out of range.
        """
        starts, n_pages = self.starts, self.n_pages
        if not len(starts) == len(n_pages) == len(self.fates) == len(self.sources):
            raise ValueError("the columns of a run table differ in length")
        if not starts:
            return
        if min(n_pages) == 0:
            raise ValueError("a run has no pages")
        if any(start % self.page_size for start in starts):
            raise ValueError(f"a run does not start at a multiple of {self.page_size}")
        size = self.page_size
        ends = [start + n * size for start, n in zip(starts, n_pages, strict=True)]
        if any(map(gt, ends, islice(starts, 1, None))) or ends[-1] > ADDRESS_LIMIT:
            raise ValueError("runs overlap, are out of order, or leave the address space")
        self._validate_fates(n_stream_pages, parent_allowed=parent_allowed)

    def _validate_fates(self, n_stream_pages: int, *, parent_allowed: bool) -> None:
        if max(self.fates) > max(Fate):
            raise ValueError(f"a run has the unknown fate {max(self.fates)}")
        if not parent_allowed and min(self.fates) == Fate.PARENT:
            raise ValueError("a full generation has a run that refers to a parent")
        is_data = self.fates.tobytes().translate(_IS_DATA)
        ends = map(add, compress(self.sources, is_data), compress(self.n_pages, is_data))
        end = max(ends, default=0)
        if end > n_stream_pages:
            raise ValueError(f"a run wants page {end - 1} of a page stream of {n_stream_pages}")
        if any(compress(self.sources, self.fates.tobytes().translate(_IS_NO_DATA))):
            raise ValueError("a run without pages in the page stream has a source")


class RunTableBuilder:
    """Collects runs in ascending order into a `RunTable`, joining neighbours that belong together.

    Shape: runs must come ascending and disjoint; `ValueError` otherwise (a bug of the caller).
    """

    def __init__(self, page_size: int) -> None:
        """Start empty, for pages of `page_size` bytes."""
        self._table = RunTable.empty(page_size)
        self._end = 0

    def add(self, start: int, n_pages: int, fate: Fate, source: int = 0) -> None:
        """Append a run; an empty one is ignored.

        Args:
            start: byte address of the first page.
            n_pages: length in pages.
            fate: what became of the pages.
            source: for `DATA`, what `GenerationWriter.write_pages` returned for the first page.
        """
        if n_pages <= 0:
            return
        table = self._table
        if start < self._end:
            raise ValueError(f"run at {start:#x} comes after one that ends at {self._end:#x}")
        joined = bool(table.starts) and start == self._end and fate == table.fates[-1]
        if joined and fate == Fate.DATA:
            joined = table.sources[-1] + table.n_pages[-1] == source
        if joined:
            table.n_pages[-1] += n_pages
        else:
            table.starts.append(start)
            table.n_pages.append(n_pages)
            table.fates.append(fate)
            table.sources.append(source)
        self._end = start + n_pages * table.page_size

    def add_pages(self, start: int, end: int, fate: Fate) -> None:
        """Append a run without pages in the stream, up to an address; an empty one is ignored."""
        self.add(start, (end - start) // self._table.page_size, fate)

    def fill(
        self,
        span: tuple[int, int],
        rest: Fate,
        starts: Sequence[int],
        ends: Sequence[int],
        sources: Sequence[int],
    ) -> None:
        """Append all pages of a span: some runs in it, and `rest` where there is none.

        There may be very many, and a tree may stand still meanwhile: no Python for each of them.
        Only the first is joined to what is before it.

        Args:
            span: byte addresses.
            rest: a fate without pages in the stream.
            starts: byte addresses of the runs, ascending, at least one.
            ends: byte addresses.
            sources: as for `add`, of `DATA`; negative: `PARENT`.
        """
        table = self._table
        n_runs = len(starts)
        # Every other one is a gap, most of them empty: gap, run, gap, run, gap.
        firsts = array("Q", bytes(8 * (2 * n_runs + 1)))
        firsts[0], firsts[1::2], firsts[2::2] = span[0], array("Q", starts), array("Q", ends)
        fates = array("B", bytes([rest])) * len(firsts)
        found = array("q", sources)
        first_pages = array("Q", bytes(8 * len(firsts)))
        if min(found) < 0:
            fates[1::2] = array("B", (_PARENT if source < 0 else _DATA for source in found))
            first_pages[1::2] = array("Q", (max(source, 0) for source in found))
        else:
            fates[1::2] = array("B", bytes([_DATA])) * n_runs
            first_pages[1::2] = array("Q", sources)
        behind = chain(islice(firsts, 1, None), span[1:])
        n_pages = list(map(floordiv, map(sub, behind, firsts), repeat(table.page_size)))
        if firsts[0] < self._end or min(n_pages) < 0:
            raise ValueError(f"runs overlap in {span[0]:#x}-{span[1]:#x}, or with those before")
        at = next(compress(count(), n_pages))
        self.add(firsts[at], n_pages[at], Fate(fates[at]), first_pages[at])
        n_pages[: at + 1] = [0] * (at + 1)
        table.starts.extend(compress(firsts, n_pages))
        table.fates.extend(compress(fates, n_pages))
        table.sources.extend(compress(first_pages, n_pages))
        table.n_pages.extend(filter(None, n_pages))
        self._end = span[1]

    def build(self) -> RunTable:
        """Return the table; the builder must not be used afterwards."""
        return self._table


@attrs.frozen(repr=False)
class ResolvedRuns:
    """A page space with every `PARENT` run replaced by what its newest ancestor holds.

    Ascending and disjoint. The columns are those of `RunTable`, and `generations` ('I'): whose page
    stream `sources` counts in, or who said `ZERO` or `FILE`.
    """

    page_size: int
    starts: "array[int]"
    n_pages: "array[int]"
    fates: "array[int]"
    generations: "array[int]"
    sources: "array[int]"

    @classmethod
    def empty(cls, page_size: int) -> Self:
        """Make the runs of a space without any mapping."""
        return cls(page_size, array("Q"), array("Q"), array("B"), array("I"), array("Q"))

    def __len__(self) -> int:
        """Number of runs."""
        return len(self.starts)

    def __iter__(self) -> Iterator[ResolvedRun]:
        """Walk the runs as objects, ascending."""
        for index in range(len(self)):
            yield self._run(index)

    def _run(self, index: int) -> ResolvedRun:
        return ResolvedRun(
            RemoteAddr(self.starts[index]),
            self.n_pages[index],
            Fate(self.fates[index]),
            GenerationNo(self.generations[index]),
            self.sources[index],
        )

    def lookup(self, addr: RemoteAddr) -> ResolvedRun | None:
        """Return the whole run that holds `addr`, or None where the space has a hole."""
        index = _find(self.starts, self.n_pages, self.page_size, addr)
        return None if index is None else self._run(index)

    def totals(self) -> dict[Fate, int]:
        """Return the number of pages of each fate; `PARENT` is always 0."""
        return _totals(self.fates, self.n_pages)

    def clip(self, wanted: Iterable[AddrRange]) -> "ResolvedRuns":
        """Return the parts inside `wanted`; holes inside `wanted` are left out.

        Args:
            wanted: ascending, disjoint, page aligned ranges.
        """
        clipped = ResolvedRuns.empty(self.page_size)
        index = 0
        for span in wanted:
            index = self._copy_part(clipped, span.start, span.end, index, None)
        return clipped

    def append(self, start: int, n_pages: int, fate: int, generation: int, source: int) -> None:
        """Append a run, for `overlay` and `clip`; joins it to the last one where they continue."""
        if self.starts and self._continues(start, fate, generation, source):
            self.n_pages[-1] += n_pages
            return
        self.starts.append(start)
        self.n_pages.append(n_pages)
        self.fates.append(fate)
        self.generations.append(generation)
        self.sources.append(source)

    def _continues(self, start: int, fate: int, generation: int, source: int) -> bool:
        last = self.n_pages[-1]
        return (
            fate == self.fates[-1]
            and generation == self.generations[-1]
            and start == self.starts[-1] + last * self.page_size
            and (fate != Fate.DATA or source == self.sources[-1] + last)
        )

    def _copy_part(
        self, into: "ResolvedRuns", start: int, end: int, index: int, gaps: list[AddrRange] | None
    ) -> int:
        """Append what lies in `start`..`end` to `into`, from run `index` on.

        Returns:
            The run to go on with for a range at or after `end`; holes are added to `gaps`.
        """
        size = self.page_size
        starts, n_pages, fates = self.starts, self.n_pages, self.fates
        at, n_runs = start, len(starts)
        if index < n_runs and starts[index] + n_pages[index] * size <= start:
            index = max(index, bisect_right(starts, start, index) - 1)
        while at < end and index < n_runs:
            run_start = starts[index]
            run_end = run_start + n_pages[index] * size
            if run_start >= end:
                break
            if run_end > at:
                if run_start > at:
                    if gaps is not None:
                        gaps.append(AddrRange(RemoteAddr(at), RemoteAddr(run_start)))
                    at = run_start
                fate = fates[index]
                source = self.sources[index]
                if fate == Fate.DATA:
                    source += (at - run_start) // size
                stop = run_end if run_end < end else end
                into.append(at, (stop - at) // size, fate, self.generations[index], source)
                at = stop
                if run_end > end:
                    return index
            index += 1
        if at < end and gaps is not None:
            gaps.append(AddrRange(RemoteAddr(at), RemoteAddr(end)))
        return index


def unresolved(table: RunTable, generation: GenerationNo) -> ResolvedRuns:
    """Return a table as it is in the form that `overlay` takes, for asking only what it covers."""
    return ResolvedRuns(
        table.page_size,
        table.starts,
        table.n_pages,
        table.fates,
        array("I", [generation]) * len(table),
        table.sources,
    )


def overlay(
    table: RunTable, generation: GenerationNo, below: ResolvedRuns | None
) -> tuple[ResolvedRuns, list[AddrRange]]:
    """Lay one generation's `table` over `below`, the resolved runs of its parent.

    One pass over both, a little Python per run and none per page.

    Returns:
        The resolved runs, and the ranges that `table` takes from a parent that does not have them
        (empty unless the chain is broken).
    """
    if Fate.PARENT not in table.fates:
        return unresolved(table, generation), []
    out = ResolvedRuns.empty(table.page_size)
    if below is None:
        below = ResolvedRuns.empty(table.page_size)
    gaps: list[AddrRange] = []
    index = 0
    size = table.page_size
    parent = int(Fate.PARENT)
    append, copy_part = out.append, below._copy_part
    for start, n, fate, source in zip(
        table.starts, table.n_pages, table.fates, table.sources, strict=True
    ):
        if fate == parent:
            index = copy_part(out, start, start + n * size, index, gaps)
        else:
            append(start, n, fate, generation, source)
    return out, gaps


def missing_below(table: RunTable, below: RunTable | None) -> list[AddrRange]:
    """Return what `table` takes from its parent, whose table is `below`, and that does not have.

    One step down is enough for a whole lineage, if each of it is looked at in the same way.
    """
    held = None if below is None else unresolved(below, GenerationNo(0))
    return overlay(table, GenerationNo(0), held)[1]
