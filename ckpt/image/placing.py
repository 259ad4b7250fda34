"""Where the pages of merged generations go: which page files are linked, which frames are copied.

`squash` gathers what a generation needs of those that it takes in. A big page file of which most is
needed gets another name, which costs nothing; of the others the frames are copied, as they are if
all of a frame is needed, and cut into pieces otherwise. Pure: nothing is read here.

    generation 3     pages-0  |#######################|..########|     linked: most is needed
    generation 4     pages-0  |####|....|##..|                         copied, skipped, cut
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator

import attrs

from ckpt.image.format import Manifest
from ckpt.image.pages import FrameLocation
from ckpt.image.runs import Fate, ResolvedRuns, RunTable, RunTableBuilder
from ckpt.units import GenerationNo

LINK_FROM_BYTES = 32 << 20
"""Smaller page files are copied: a chain that is pruned for years must not gather files."""

LINK_SHARE = 2
"""A page file is linked if at least one in so many of its pages is needed."""

Span = tuple[int, int]
"""Pages of a stream: the first, and one past the last."""


def needed_of(spaces: Iterable[ResolvedRuns], own: GenerationNo) -> dict[GenerationNo, list[Span]]:
    """Return which pages of which other generations' streams `spaces` need: ascending, disjoint."""
    raw: dict[GenerationNo, list[Span]] = {}
    for runs in spaces:
        for fate, generation, source, n in zip(
            runs.fates, runs.generations, runs.sources, runs.n_pages, strict=True
        ):
            if fate == Fate.DATA and generation != own:
                raw.setdefault(GenerationNo(generation), []).append((source, source + n))
    return {generation: _join(spans) for generation, spans in raw.items()}


def _join(spans: list[Span]) -> list[Span]:
    """Return the pages of `spans`, which may overlap (processes share pages), once."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def clip(spans: list[Span], start: int, end: int) -> list[Span]:
    """Return the parts of ascending, disjoint `spans` that lie in `start`..`end`."""
    first = max(bisect_right(spans, (start, start)) - 1, 0)
    parts: list[Span] = []
    for index in range(first, len(spans)):
        one_start, one_end = spans[index]
        if one_start >= end:
            break
        if one_end > start:
            parts.append((max(one_start, start), min(one_end, end)))
    return parts


@attrs.frozen(repr=False)
class Portion:
    """What is taken of one page file."""

    manifest: Manifest
    file: int
    first_page: int
    """Ordinal of its first page in the page stream of its generation."""
    n_pages: int
    parts: list[Span]
    """The pages that are needed."""

    @property
    def is_worth_linking(self) -> bool:
        """Whether the whole file is taken as it is."""
        live = sum(end - start for start, end in self.parts)
        size_bytes = self.manifest.page_files[self.file].size_bytes
        return size_bytes >= LINK_FROM_BYTES and live * LINK_SHARE >= self.n_pages

    def iter_frames(self) -> Iterator[tuple[FrameLocation, list[Span]]]:
        """Yield the frames that are needed, each with its pages that are."""
        index = self.manifest.frame_index()
        for number in range(len(self.manifest.page_files[self.file].frames)):
            frame = index.frame(self.file, number)
            parts = clip(self.parts, frame.first_page, frame.first_page + frame.n_pages)
            if parts:
                yield frame, parts


def iter_portions(
    needed: dict[GenerationNo, list[Span]], line: Iterable[Manifest]
) -> Iterator[Portion]:
    """Yield what is needed of each page file of the generations of `line`."""
    for manifest in line:
        spans = needed.get(manifest.generation)
        if not spans:
            continue
        first = 0
        for file, page_file in enumerate(manifest.page_files):
            n_pages = sum(page_file.frames.n_pages)
            parts = clip(spans, first, first + n_pages)
            if parts:
                yield Portion(manifest, file, first, n_pages, parts)
            first += n_pages


@attrs.define(repr=False)
class _Moved:
    """Pages of one generation's stream and where they are now; columns, ascending once sorted."""

    starts: "array[int]" = attrs.field(factory=lambda: array("Q"))
    ends: "array[int]" = attrs.field(factory=lambda: array("Q"))
    targets: "array[int]" = attrs.field(factory=lambda: array("Q"))

    def sort(self) -> None:
        order = sorted(range(len(self.starts)), key=self.starts.__getitem__)
        for column in (self.starts, self.ends, self.targets):
            column[:] = array("Q", (column[index] for index in order))


class Moves:
    """Where each page that was taken in is now, in the page stream of who took it."""

    def __init__(self) -> None:
        """Nothing was moved yet."""
        self._of: dict[GenerationNo, _Moved] = {}

    def add(self, generation: GenerationNo, start: int, end: int, target: int) -> None:
        """Note that pages `start`..`end` of a generation begin at `target` now."""
        moved = self._of.setdefault(generation, _Moved())
        moved.starts.append(start)
        moved.ends.append(end)
        moved.targets.append(target)

    def table_of(self, runs: ResolvedRuns, own: GenerationNo) -> RunTable:
        """Return `runs` as the table of generation `own`, after all was added."""
        builder = RunTableBuilder(runs.page_size)
        for start, n, fate, generation, source in zip(
            runs.starts, runs.n_pages, runs.fates, runs.generations, runs.sources, strict=True
        ):
            if fate != Fate.DATA or generation == own:
                builder.add(start, n, Fate(fate), source)
                continue
            at = start
            for target, n_moved in self._iter_moved(GenerationNo(generation), source, n):
                builder.add(at, n_moved, Fate.DATA, target)
                at += n_moved * runs.page_size
        return builder.build()

    def _iter_moved(
        self, generation: GenerationNo, source: int, n_pages: int
    ) -> Iterator[tuple[int, int]]:
        moved = self._of[generation]
        index = bisect_right(moved.starts, source) - 1
        end = source + n_pages
        while source < end:
            if index < 0 or not moved.starts[index] <= source < moved.ends[index]:
                raise AssertionError(f"page {source} of generation {generation} was not taken in")
            stop = min(end, moved.ends[index])
            yield moved.targets[index] + source - moved.starts[index], stop - source
            source = stop
            index += 1

    def sort(self) -> None:
        """Make ready for `table_of`."""
        for moved in self._of.values():
            moved.sort()
