"""What changed between two generations of a chain, by what both images say of each process.

    mapping of M and of N         said to be
    same place, same backing      the same one, if need be grown, shrunk, moved its ends, or
                                  protected otherwise; its pages are compared
    no counterpart                gone, or made

A page counts as changed if its bytes are others. Where both generations take it from the same place
of the same page stream, which is what a delta says of a page that was not written, nothing is read;
of the others the bytes are compared (a page may have been written and hold what it held). What is a
file's own in one of them and not in the other has changed.

Neighbours: `portrait` shows one generation; `image.runs` lays the tables of a chain over another.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence

import attrs

from ckpt.engine.examining import Examined
from ckpt.engine.portrait import (
    Backing,
    FileView,
    MappingView,
    ProcessView,
    ThreadView,
    portray_all,
)
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.tracker.compare import equal_pages
from ckpt.tracker.spans import Spans, join, total_bytes
from ckpt.units import AddrRange, RemoteAddr

_WINDOW_BYTES = 8 << 20
"""How much is compared at once: our memory does not grow with that of the process."""

ReportCompared = Callable[[int], None]


@attrs.frozen(slots=True)
class MappingChange:
    """A mapping that both generations have."""

    before: MappingView
    after: MappingView
    n_common: int
    """Pages that both have, and that are known."""
    n_changed: int
    """Those of them that hold something else."""

    @property
    def is_reshaped(self) -> bool:
        """Tell whether its ends, its protection or its name are others."""
        return _shape(self.before) != _shape(self.after)


@attrs.frozen(slots=True)
class FileChange:
    """A descriptor that is something else."""

    before: FileView
    after: FileView


@attrs.frozen(slots=True, repr=False)
class ProcessChange:
    """A process that both generations have."""

    before: ProcessView
    after: ProcessView
    threads_come: tuple[ThreadView, ...]
    threads_gone: tuple[ThreadView, ...]
    mappings_made: tuple[MappingView, ...]
    mappings_gone: tuple[MappingView, ...]
    mappings: tuple[MappingChange, ...]
    """All that both have, ascending, changed or not."""
    files_opened: tuple[FileView, ...]
    files_closed: tuple[FileView, ...]
    files_changed: tuple[FileChange, ...]

    @property
    def runs_another_program(self) -> bool:
        """Tell whether it has executed another one."""
        return self.before.executable != self.after.executable

    @property
    def n_changed_pages(self) -> int:
        """Pages of mappings that both have that hold something else."""
        return sum(one.n_changed for one in self.mappings)


@attrs.frozen(slots=True, repr=False)
class Difference:
    """All that changed."""

    page_size: int
    come: tuple[ProcessView, ...]
    gone: tuple[ProcessView, ...]
    common: tuple[ProcessChange, ...]


def compare(before: Examined, after: Examined, report: ReportCompared | None = None) -> Difference:
    """Compare two generations of one chain; neither must be the older one.

    Args:
        before: the one.
        after: the other.
        report: called with the number of bytes that were compared.

    Raises:
        ImageError: a page that must be read is damaged, or cannot be resolved.
    """
    pages = _Pages(before.reader, after.reader, report)
    old, new = ({one.pid: one for one in portray_all(side)} for side in (before, after))
    return Difference(
        after.reader.manifest.page_size,
        come=tuple(one for pid, one in new.items() if pid not in old),
        gone=tuple(one for pid, one in old.items() if pid not in new),
        common=tuple(_compare(one, new[pid], pages) for pid, one in old.items() if pid in new),
    )


def _compare(before: ProcessView, after: ProcessView, pages: "_Pages") -> ProcessChange:
    pairs = list(pair_mappings(before.mappings, after.mappings))
    paired = {id(one) for pair in pairs for one in pair}
    old_tids, new_tids = ({one.tid for one in side.threads} for side in (before, after))
    old_fds, new_fds = ({one.fd: one for one in side.files} for side in (before, after))
    return ProcessChange(
        before,
        after,
        threads_come=tuple(one for one in after.threads if one.tid not in old_tids),
        threads_gone=tuple(one for one in before.threads if one.tid not in new_tids),
        mappings_made=tuple(one for one in after.mappings if id(one) not in paired),
        mappings_gone=tuple(one for one in before.mappings if id(one) not in paired),
        mappings=tuple(MappingChange(*pair, *pages.count(*pair)) for pair in pairs),
        files_opened=tuple(one for fd, one in new_fds.items() if fd not in old_fds),
        files_closed=tuple(one for fd, one in old_fds.items() if fd not in new_fds),
        files_changed=tuple(
            FileChange(one, new_fds[fd])
            for fd, one in old_fds.items()
            if fd in new_fds and _file_shape(one) != _file_shape(new_fds[fd])
        ),
    )


def _file_shape(one: FileView) -> tuple[object, ...]:
    # The offset moves with every read, and says nothing of what the descriptor is.
    return one.access, one.kind, one.name, one.close_on_exec


# -- mappings --------------------------------------------------------------------------------------


def _shape(one: MappingView) -> tuple[object, ...]:
    return one.start, one.end, one.access, one.name


def pair_mappings(
    before: Sequence[MappingView], after: Sequence[MappingView]
) -> Iterator[tuple[MappingView, MappingView]]:
    """Yield which mappings are the same one; both ascending, each in one pair at most.

    They overlap and are of the same file at the same place, or both of none. A mapping that was cut
    in two is the first of its parts; the others are made.
    """
    index = 0
    for one in before:
        while index < len(after) and after[index].end <= one.start:
            index += 1
        at = index
        while at < len(after) and after[at].start < one.end:
            if _is_same(one, after[at]):
                yield one, after[at]
                index = at + 1
                break
            at += 1


def _is_same(before: MappingView, after: MappingView) -> bool:
    if _is_of_file(before) or _is_of_file(after):
        place = (before.name, before.offset_bytes - before.start)
        if place != (after.name, after.offset_bytes - after.start):
            return False
    return before.access[-1] == after.access[-1]


def _is_of_file(one: MappingView) -> bool:
    return one.name.startswith("/")


# -- pages -----------------------------------------------------------------------------------------


class _Pages:
    """Compares the pages of two generations."""

    def __init__(
        self, before: PageReader, after: PageReader, report: ReportCompared | None
    ) -> None:
        self._before = before
        self._after = after
        self._report = report
        self._size = after.manifest.page_size
        self._done_bytes = 0

    def count(self, before: MappingView, after: MappingView) -> tuple[int, int]:
        """Return how many pages both have, and how many of them differ."""
        start, end = max(before.start, after.start), min(before.end, after.end)
        if before.backing is None or after.backing is None:
            return 0, 0
        left = _shifted(self._before, before.backing, start, end)
        right = _shifted(self._after, after.backing, start, end)
        apart = tell_apart(left, right)
        n_changed = total_bytes(apart.differing) // self._size
        for span in _iter_windows(apart.unsure):
            n_changed += self._count_changed(before.backing, after.backing, span)
        return apart.n_common, n_changed

    def _count_changed(self, before: Backing, after: Backing, span: AddrRange) -> int:
        was = self._before.read(before.space, before.span(span.start, span.end))
        now = self._after.read(after.space, after.span(span.start, span.end))
        self._done_bytes += span.len_bytes
        if self._report:
            self._report(self._done_bytes)
        return equal_pages(memoryview(now), memoryview(was), self._size).count(False)


def _shifted(reader: PageReader, backing: Backing, start: int, end: int) -> ResolvedRuns:
    """Return the pages of a part of a mapping, by the addresses of the process."""
    runs = reader.resolve(backing.space).clip([backing.span(start, end)])
    return attrs.evolve(runs, starts=array("Q", (at - backing.shift for at in runs.starts)))


@attrs.define(slots=True, eq=False)
class Apart:
    """What two generations say of the same addresses."""

    n_common: int = 0
    """Pages that both have."""
    differing: Spans = attrs.field(factory=list)
    """A file's own in one of them."""
    unsure: Spans = attrs.field(factory=list)
    """From different places: only the bytes can tell."""


def tell_apart(before: ResolvedRuns, after: ResolvedRuns) -> Apart:
    """Compare where two generations take their pages from; one pass over both, none per page."""
    size = before.page_size
    apart = Apart()
    i = j = 0
    while i < len(before) and j < len(after):
        before_end = before.starts[i] + before.n_pages[i] * size
        after_end = after.starts[j] + after.n_pages[j] * size
        start = max(before.starts[i], after.starts[j])
        end = min(before_end, after_end)
        if start < end:
            apart.n_common += (end - start) // size
            if Fate.FILE in (before.fates[i], after.fates[j]):
                if before.fates[i] != after.fates[j]:
                    apart.differing.append((start, end))
            elif _place(before, i, start) != _place(after, j, start):
                apart.unsure.append((start, end))
        i += before_end == end
        j += after_end == end
    apart.unsure = join(apart.unsure)
    return apart


def _place(runs: ResolvedRuns, index: int, address: int) -> tuple[int, int] | None:
    """Return generation and ordinal of a page in the page stream; None if it is zero."""
    if runs.fates[index] == Fate.ZERO:
        return None
    into = (address - runs.starts[index]) // runs.page_size
    return runs.generations[index], runs.sources[index] + into


def _iter_windows(spans: Spans) -> Iterator[AddrRange]:
    for start, end in spans:
        for at in range(start, end, _WINDOW_BYTES):
            stop = min(at + _WINDOW_BYTES, end)
            yield AddrRange(RemoteAddr(at), RemoteAddr(stop))
