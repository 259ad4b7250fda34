"""What a chain tells of its past: its processes, and which of their memory was written when.

Manifests alone are read, never a page. A `Row` follows one mapping (or one file without a name,
which has a page space of its own) from generation to generation: it is the same while its name is
and while it overlaps the place where it was, so a heap that grows and a mapping that mprotect(2)
has split stay one row each.

    generation        0 full   1 delta   2 delta       `sizes`    (0, 4) (2, 6)
    [heap]            4        . W . .   . . . . W W   `written`  1: 1 page, 2: 2 pages

Written is what a delta stored. A full generation stores everything and tells nothing of that.
Neighbours: `records` has the shape of what is read; `ckpt report` draws it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping

import attrs

from ckpt.engine.records import ProcessImage, TreeImage, decode_tree
from ckpt.errors import ImageCorrupt
from ckpt.image.chain import Chain
from ckpt.image.format import Kind, Manifest
from ckpt.image.runs import Fate, RunTable
from ckpt.resources.content import ContentKind
from ckpt.resources.memory import MmFields, VmaRecord
from ckpt.resources.vmas import PROT_EXEC, PROT_READ, PROT_WRITE
from ckpt.units import GenerationNo, Pid

N_BINS = 32
"""Into how many parts of equal length a mapping is cut, to tell where it was written; into its
pages if it has fewer."""

LEVELS = 9
"""How finely the written share of one part is told: 0 is nothing, 9 all of it."""


@attrs.frozen(slots=True, repr=False)
class Written:
    """What one delta stored of one row."""

    n_pages: int
    bins: str
    """A digit for each part, its level, ascending by address."""


@attrs.define(repr=False)
class Row:
    """One mapping through the generations; indexes count the generations that were asked for."""

    owner: Pid
    """The process that has it, or whose it was first; 0 if the records do not say."""
    name: str
    """Path of the file, or what the kernel calls it; bytes that are no UTF-8 are surrogates."""
    protection: str
    """`rw-`; empty for a file without a name."""
    start: int
    end: int
    """Where it was last, half-open, in bytes: addresses, or offsets in a file without a name."""
    sizes: list[tuple[int, int]] = attrs.Factory(list)
    """Index and pages, where that changes; 0 pages: it is not there."""
    written: dict[int, Written] = attrs.Factory(dict)
    """By index, only of deltas, and only if anything was."""

    @property
    def written_pages(self) -> int:
        """All that was written of it."""
        return sum(one.n_pages for one in self.written.values())

    def note_size(self, index: int, n_pages: int) -> None:
        """Tell how big it is from the generation of `index` on."""
        if (self.sizes[-1][1] if self.sizes else 0) != n_pages:
            self.sizes.append((index, n_pages))


@attrs.define(repr=False)
class Life:
    """One process through the generations; what changes is as it was last."""

    pid: Pid
    parent: Pid
    name: str
    exe: str
    n_threads: int
    n_fds: int
    mapped_bytes: int
    first: int
    last: int
    """Indexes of the first and the last generation that have it."""


@attrs.frozen(repr=False)
class History:
    """All that `read_history` has found."""

    manifests: tuple[Manifest, ...]
    """Without records and run tables: those may be big."""
    totals: tuple[Mapping[Fate, int], ...]
    """Of each: how many pages of each fate."""
    rows: tuple[Row, ...]
    """By process, in the order of their addresses there."""
    lives: tuple[Life, ...]
    """In the order in which they appear, parents before their children."""


@attrs.frozen(slots=True, repr=False)
class _Region:
    """Where one generation has a row or a part of it."""

    space: str
    owner: Pid
    name: str
    protection: str
    start: int
    end: int


def read_history(chain: Chain, numbers: Iterable[GenerationNo]) -> History:
    """Read what the manifests of some generations tell, the oldest first.

    Raises:
        ImageError: a manifest is damaged, or there is none of that number.
    """
    following = _Following()
    lives: dict[Pid, Life] = {}
    manifests: list[Manifest] = []
    totals: list[Mapping[Fate, int]] = []
    for index, number in enumerate(numbers):
        chain.forget()
        manifest = chain.manifest(number)
        tree = _decode(manifest, chain)
        following.add(index, manifest, list(_iter_regions(tree, manifest)))
        for process in tree.processes if tree else ():
            _live(lives, index, process)
        totals.append(manifest.totals())
        manifests.append(attrs.evolve(manifest, records={}, spaces={}))
    order = {pid: place for place, pid in enumerate(lives)}
    rows = sorted(following.rows, key=lambda row: (order.get(row.owner, len(order)), row.start))
    return History(tuple(manifests), tuple(totals), tuple(rows), tuple(lives.values()))


def _decode(manifest: Manifest, chain: Chain) -> TreeImage | None:
    try:
        return decode_tree(manifest, str(chain.manifest_path(manifest.generation)))
    except ImageCorrupt:
        return None  # A restore says why; the rest can be told without.


def _live(lives: dict[Pid, Life], index: int, process: ProcessImage) -> None:
    memory, files = process.resources["memory"], process.resources["files"]
    now = Life(
        pid=process.pid,
        parent=process.place.parent,
        name=_name_of(process),
        exe=memory.exe.path,
        n_threads=len(process.threads),
        n_fds=len(files.fds),
        mapped_bytes=sum(vma.end - vma.start for vma in memory.vmas),
        first=index,
        last=index,
    )
    if (before := lives.get(process.pid)) is not None:
        now.first = before.first
    lives[process.pid] = now


def _name_of(process: ProcessImage) -> str:
    if process.ended_leader is not None:
        return process.ended_leader.comm
    name: bytes = process.threads[0].resources["thread"].name
    return name.rstrip(b"\0").decode(errors="surrogateescape")


def _iter_regions(tree: TreeImage | None, manifest: Manifest) -> Iterator[_Region]:
    """Name all that a generation may hold pages of."""
    if tree is None:
        for space, table in manifest.spaces.items():
            if len(table):
                end = table.starts[-1] + table.n_pages[-1] * table.page_size
                yield _Region(space, Pid(0), space, "", table.starts[0], end)
        return
    for process in tree.processes:
        if process.has_memory:
            yield from _iter_mappings(process)
        for content in process.resources["contents"].contents:
            if content.size_bytes:
                shared = content.kind == ContentKind.ANONYMOUS
                name = "shared memory" if shared else f"{content.path} ({content.kind})"
                end = -(-content.size_bytes // manifest.page_size) * manifest.page_size
                yield _Region(content.space, process.pid, name, "", 0, end)


def _iter_mappings(process: ProcessImage) -> Iterator[_Region]:
    memory = process.resources["memory"]
    before: _Region | None = None
    for vma in memory.vmas:
        if not vma.has_own_pages:
            continue  # Its pages are a file's, maybe one of the contents.
        name = memory.files[vma.file].path if vma.file >= 0 else vma.name or _area(vma, memory.mm)
        region = _Region(process.space, process.pid, name, _letters(vma.prot), vma.start, vma.end)
        if before is not None and _continues(before, region):
            before = attrs.evolve(before, end=region.end)
            continue
        if before is not None:
            yield before
        before = region
    if before is not None:
        yield before


def _continues(before: _Region, region: _Region) -> bool:
    """Tell whether it is one mapping but for what a tracker has registered of it."""
    return (
        before.end == region.start
        and attrs.evolve(before, start=region.start, end=region.end) == region
    )


def _area(vma: VmaRecord, mm: MmFields) -> str:
    """Return what /proc/PID/maps calls memory that no file is behind."""
    if vma.start <= mm.brk and vma.end >= mm.start_brk:
        return "[heap]"
    if vma.start <= mm.start_stack < vma.end:
        return "[stack]"
    return "anonymous"


def _letters(prot: int) -> str:
    bits = ((PROT_READ, "r"), (PROT_WRITE, "w"), (PROT_EXEC, "x"))
    return "".join(letter if prot & bit else "-" for bit, letter in bits)


class _Following:
    """Finds the row of each region, generation by generation."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._there: dict[tuple[Pid, str], list[Row]] = {}
        """The rows of the last generation by owner and name, ascending and disjoint."""

    def add(self, index: int, manifest: Manifest, regions: list[_Region]) -> None:
        """Take in what one generation has; regions ascend within each space."""
        met: dict[int, tuple[Row, list[_Region]]] = {}
        for region in regions:
            row = self._row_of(region)
            met.setdefault(id(row), (row, []))[1].append(region)
        gone = [row for rows in self._there.values() for row in rows if id(row) not in met]
        self._there = {}
        for row, parts in met.values():
            row.start, row.end = parts[0].start, parts[-1].end
            row.protection = parts[-1].protection
            row.note_size(
                index, sum((part.end - part.start) // manifest.page_size for part in parts)
            )
            if manifest.kind is Kind.DELTA:
                _count(index, row, manifest, parts)
            self._there.setdefault((row.owner, row.name), []).append(row)
        for rows in self._there.values():
            rows.sort(key=lambda row: row.start)
        for row in gone:
            row.note_size(index, 0)

    def _row_of(self, region: _Region) -> Row:
        there = self._there.get((region.owner, region.name), [])
        at = bisect_left(there, region.end, key=lambda row: row.start) - 1
        if at >= 0 and there[at].end > region.start:
            return there[at]
        row = Row(region.owner, region.name, region.protection, region.start, region.end)
        self.rows.append(row)
        return row


def _count(index: int, row: Row, manifest: Manifest, parts: list[_Region]) -> None:
    size = manifest.page_size
    n_pages = (row.end - row.start) // size
    counts = [0] * min(N_BINS, n_pages)
    total = 0
    for part in parts:
        table = manifest.spaces.get(part.space)
        if table is None:
            continue
        for start, end in _iter_stored(table, part.start, part.end):
            total += (end - start) // size
            _spread(counts, (start - row.start) // size, (end - row.start) // size, n_pages)
    if total:
        row.written[index] = Written(total, _levels(counts, n_pages))


def _iter_stored(table: RunTable, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Walk what a generation stored of `start`..`end`, in bytes, ascending."""
    size, data = table.page_size, int(Fate.DATA)
    index = max(0, bisect_right(table.starts, start) - 1)
    while index < len(table) and (at := table.starts[index]) < end:
        stop = at + table.n_pages[index] * size
        if table.fates[index] == data and stop > start:
            yield max(at, start), min(stop, end)
        index += 1


def _spread(counts: list[int], first: int, last: int, n_pages: int) -> None:
    """Add the pages `first`..`last` of `n_pages` to the parts that they are in."""
    n_parts = len(counts)
    at = first
    while at < last:
        part = at * n_parts // n_pages
        stop = min(last, _first_page(part + 1, n_parts, n_pages))
        counts[part] += stop - at
        at = stop


def _levels(counts: list[int], n_pages: int) -> str:
    """Return the share of each part as a digit; one page of many is more than nothing."""
    n_parts = len(counts)
    digits = []
    for part, count in enumerate(counts):
        first, end = (_first_page(one, n_parts, n_pages) for one in (part, part + 1))
        digits.append(str(-(-count * LEVELS // (end - first))))
    return "".join(digits)


def _first_page(part: int, n_parts: int, n_pages: int) -> int:
    return -(-part * n_pages // n_parts)
