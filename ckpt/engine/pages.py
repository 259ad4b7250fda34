"""The pages of a dump: which are stored, which are left to the parent, and what the image says.

    VMA            | anonymous                                  | file mapping      |
    populated        ######    ########   ######                       ####
    clean            ###         ####                                  ##
    in the parent    #####       ####     ######                       ####
    fate             PPPDDDZZZZDDPPPPDDZZZDDDDDD                 FFFFFFPPDDFFFFFF

Nothing here runs once per page: fates come in runs. `copying` moves the pages.
"""

from collections.abc import Iterable

import attrs

from ckpt.image.runs import Fate, RunTable, RunTableBuilder
from ckpt.kernel.procfs import maps
from ckpt.resources.memory import MemoryRecord, iter_own_vmas
from ckpt.tracker.base import Scan
from ckpt.tracker.spans import Own, Spans, intersect, join, subtract, total_bytes
from ckpt.units import Pid

Copies = list[tuple[int, int, int]]
"""Where copied pages are: start and end of their addresses, ordinal of the first in the stream."""


def read_own_mappings(pid: Pid) -> Own:
    """Return the mappings of a running process whose pages can be its own; soon out of date."""
    vmas = [vma for vma in iter_own_vmas(maps.read_maps(pid)) if not vma.shared]
    return Own(
        anonymous=join((v.span.start, v.span.end) for v in vmas if not v.is_file),
        mapped=join((v.span.start, v.span.end) for v in vmas if v.is_file),
    )


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


def spans_without_twin(memory: MemoryRecord) -> Spans:
    """Return the mappings that a fork leaves out, or empties."""
    left_out = {"dc", "wf"}
    return join((vma.start, vma.end) for vma in memory.vmas if left_out & set(vma.flags))


def covered(table: RunTable) -> Spans:
    """Return the pages that a generation, with its ancestors, holds the content of.

    Its own table is enough: a page is left to a parent only where that has it (`split`).
    """
    return join(
        (start, start + n * table.page_size)
        for start, n, fate in zip(table.starts, table.n_pages, table.fates, strict=True)
        if fate in (Fate.DATA, Fate.PARENT)
    )


@attrs.define(slots=True, repr=False)
class Held:
    """The pages whose content, as it was at the last scan, the image has already.

    The parent generation holds them, or this dump has copied them. One list for both, since parts
    that lie in turn are whole together: what is done with it while frozen takes as long as what was
    written is scattered, not as long as what is held.
    """

    pages: Spans

    def see(self, scan: Scan, untrusted: Spans) -> Spans:
        """Forget what was written, or is gone; return the pages that are missing.

        A page stays held only if it is clean *and* was held.
        """
        self.pages = intersect(self.pages, subtract(scan.clean, untrusted))
        return subtract(scan.populated, self.pages)

    def add(self, copied: Spans) -> None:
        """Note pages that were copied after the last scan."""
        self.pages = join([*self.pages, *copied])

    def forget(self, spans: Spans) -> None:
        """Believe no more that these are held."""
        self.pages = subtract(self.pages, spans)

    def missing(self, scan: Scan) -> Spans:
        """Return the pages that must be copied, by a scan that `see` was told of."""
        return subtract(scan.populated, self.pages)

    def tell_apart(self, copied: Spans) -> tuple[Spans, Spans]:
        """Return what is held by copies of this dump, and what by the parent.

        A page that was copied was not, or no more, the parent's.

        Args:
            copied: all that was copied of this address space, in whatever round.
        """
        copied = intersect(self.pages, copied)
        return copied, subtract(self.pages, copied)


@attrs.frozen(slots=True, repr=False)
class Copied:
    """What was copied of one address space in one go, one page after the other."""

    space: str
    spans: Spans
    """Ascending; shorter than asked for where the process has unmapped something meanwhile."""


@attrs.frozen(slots=True, repr=False)
class Alias:
    """What was not copied of an address space: the copies of another one's pages stand for it.

    It stands in the stream without a page, behind those copies. See `sharing`.
    """

    space: str
    spans: Spans
    source: str
    """Whose pages they are, at the same addresses: the newest before this."""


class Stream:
    """All that was copied, of all address spaces, in the order of the page stream."""

    def __init__(self, entries: Iterable[Copied | Alias] = ()) -> None:
        """Begin with some."""
        self._entries: list[Copied | Alias] = []
        # As many processes, as many entries: who asks for its own does not walk those of others.
        self._by_space: dict[str, list[int]] = {}
        self._firsts: list[int] = []
        for entry in entries:
            self.append(entry)

    def append(self, entry: Copied | Alias) -> None:
        """Add what comes next; the spans of the one before are complete."""
        self._by_space.setdefault(entry.space, []).append(len(self._entries))
        self._entries.append(entry)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._entries)

    def __getitem__(self, index: int) -> Copied | Alias:
        """Return one of them."""
        return self._entries[index]

    def of(self, space: str) -> list[tuple[int, Copied | Alias]]:
        """Return those of one address space, each with its number among all."""
        return [(index, self._entries[index]) for index in self._by_space.get(space, ())]

    def first_page(self, index: int, page_size: int) -> int:
        """Return the ordinal of the first page of an entry, behind which none will be changed."""
        firsts = self._firsts
        while len(firsts) <= index:
            before = self._entries[len(firsts) - 1] if firsts else None
            n_bytes = total_bytes(before.spans) if isinstance(before, Copied) else 0
            firsts.append((firsts[-1] if firsts else 0) + n_bytes // page_size)
        return firsts[index]


def find_newest(stream: Stream, space: str, held: Spans, page_size: int) -> Copies:
    """Return where in the page stream the newest copy of each held page is, by address.

    Args:
        stream: all that was copied, of all address spaces, in the order of the page stream.
        space: whose pages.
        held: the pages wanted; each was copied once at least.
        page_size: in bytes.
    """
    copies: Copies = []
    looking = [(len(stream), space, held)]
    while looking:
        end, wanted_space, wanted = looking.pop()
        for index, copied in reversed(stream.of(wanted_space)):
            if index >= end or not wanted:
                continue
            if isinstance(copied, Copied):
                first = stream.first_page(index, page_size)
                copies += _locate(copied.spans, first, wanted, page_size)
            else:
                looking.append((index, copied.source, intersect(wanted, copied.spans)))
            wanted = subtract(wanted, copied.spans)
    return sorted(copies)


def all_copied(stream: Stream, space: str) -> Spans:
    """Return all that was copied of an address space."""
    return join(span for _, copied in stream.of(space) for span in copied.spans)


def _locate(spans: Spans, first: int, wanted: Spans, page_size: int) -> Copies:
    copies: Copies = []
    source = first
    index = 0
    for start, end in spans:
        while index < len(wanted) and wanted[index][1] <= start:
            index += 1
        at = index
        while at < len(wanted) and wanted[at][0] < end:
            part, stop = max(start, wanted[at][0]), min(end, wanted[at][1])
            copies.append((part, stop, source + (part - start) // page_size))
            at += 1
        source += (end - start) // page_size
    return copies


def build_runs(memory: MemoryRecord, copies: Copies, parent: Spans, page_size: int) -> RunTable:
    """Return the run table of one address space: every page of every mapping has a fate.

    Args:
        memory: the mappings.
        copies: pages of this generation's page stream, ascending by address.
        parent: pages that the parent holds.
        page_size: in bytes.
    """
    builder = RunTableBuilder(page_size)
    fates = sorted(
        [(start, end, Fate.DATA, source) for start, end, source in copies]
        + [(start, end, Fate.PARENT, 0) for start, end in parent]
    )
    index = 0
    for vma in memory.vmas:
        if vma.special:
            continue
        rest = Fate.FILE if vma.file >= 0 else Fate.ZERO
        at = vma.start
        while index < len(fates) and fates[index][0] < vma.end:
            first, end, fate, source = fates[index]
            stop = min(end, vma.end)
            start = max(first, vma.start)
            if fate is Fate.DATA:
                source += (start - first) // page_size
            builder.add(at, (start - at) // page_size, rest)
            builder.add(start, (stop - start) // page_size, fate, source)
            at = stop
            if end > vma.end:
                break
            index += 1
        builder.add(at, (vma.end - at) // page_size, rest)
    return builder.build()
