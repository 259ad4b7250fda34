"""The pages of a dump: which are stored, which are left to the parent, and what the image says.

    VMA            | anonymous                                  | file mapping      |
    populated        ######    ########   ######                       ####
    clean            ###         ####                                  ##
    in the parent    #####       ####     ######                       ####
    fate             PPPDDDZZZZDDPPPPDDZZZDDDDDD                 FFFFFFPPDDFFFFFF

Nothing here runs once per page: fates come in runs. `copying` moves the pages.
"""

from bisect import bisect_left

import attrs

from ckpt.engine.stream import Copies
from ckpt.image.runs import Fate, RunTable, RunTableBuilder
from ckpt.kernel.procfs import maps
from ckpt.resources.memory import KERNEL_VMAS, MemoryRecord, iter_own_vmas
from ckpt.tracker.base import Scan
from ckpt.tracker.spans import Own, Spans, intersect, join, subtract, unite
from ckpt.units import Pid


def read_own_mappings(pid: Pid) -> Own:
    """Return the mappings of a running process whose pages can be its own; soon out of date."""
    vmas = [
        vma
        for vma in iter_own_vmas(maps.read_maps(pid))
        if not vma.shared and vma.path not in KERNEL_VMAS
    ]
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
        self.pages = unite(self.pages, copied)

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


IN_PARENT = -1
"""Instead of an ordinal in the stream."""


def build_file_runs(n_pages: int, copies: Copies, page_size: int) -> RunTable:
    """Return the run table of the content of a file; what no copy has is a hole.

    Args:
        n_pages: how many the file has.
        copies: ascending by offset; `IN_PARENT` those that the parent holds.
        page_size: in bytes.
    """
    builder = RunTableBuilder(page_size)
    whole = (0, n_pages * page_size)
    if copies:
        starts, ends, sources = zip(*copies, strict=True)
        builder.fill(whole, Fate.ZERO, starts, ends, sources)
    else:
        builder.add_pages(*whole, Fate.ZERO)
    return builder.build()


def build_runs(memory: MemoryRecord, copies: Copies, parent: Spans, page_size: int) -> RunTable:
    """Return the run table of one address space: every page of every mapping has a fate.

    Args:
        memory: the mappings.
        copies: pages of this generation's page stream, ascending by address.
        parent: pages that the parent holds.
        page_size: in bytes.
    """
    builder = RunTableBuilder(page_size)
    pieces = copies
    if parent:
        pieces = sorted([*copies, *((start, end, IN_PARENT) for start, end in parent)])
    index = 0
    for vma in memory.vmas:
        if vma.special:
            continue
        while index < len(pieces) and pieces[index][1] <= vma.start:
            index += 1
        behind = bisect_left(pieces, (vma.end,), index)
        own = pieces[index:behind]
        rest = Fate.FILE if vma.file >= 0 else Fate.ZERO
        if own:
            own[0] = _cut(own[0], vma.start, own[0][1], page_size)
            own[-1] = _cut(own[-1], own[-1][0], vma.end, page_size)
            starts, ends, sources = zip(*own, strict=True)
            builder.fill((vma.start, vma.end), rest, starts, ends, sources)
        else:
            builder.add_pages(vma.start, vma.end, rest)
        index = max(index, behind - 1)
    return builder.build()


def _cut(piece: tuple[int, int, int], start: int, end: int, page_size: int) -> tuple[int, int, int]:
    """Return what of a piece lies between two addresses."""
    first, last, source = piece
    start, end = max(first, start), min(last, end)
    if source != IN_PARENT:
        source += (start - first) // page_size
    return start, end, source
