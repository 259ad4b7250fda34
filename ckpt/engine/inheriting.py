"""What a process under construction has from its parent, copied on write by the kernel.

    parent, filled      [A][B][C][D]     its image: generation and place in the page stream of each
    child, born         [A][B][C][D]     the kernel's doing: the same page frames
    child, of its image [A][X]   [D]     X is written, C dropped; A and D are nobody's work, and
                                         stay the same page frames as long as nobody writes

A page is what the child must have if both images resolve its address to the same page of the same
generation; nothing is compared. Who forks from whom is `growing`; which mappings stay is
`resources/remapping`.
"""

from collections.abc import Sequence

import attrs

from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.resources.memory import MemoryRecord, inheritable
from ckpt.resources.remapping import Mapping, Pages, plan_pages
from ckpt.tracker.spans import Spans, join


@attrs.frozen(repr=False)
class Inheritance:
    """The memory of a process that was filled when it forked."""

    mapped: Sequence[Mapping] = ()
    runs: ResolvedRuns | None = None
    """What it was filled with, or a part of that."""
    pages: Spans = attrs.Factory(list)
    """All pages that it has."""


NOTHING = Inheritance()
"""Of the seed, or where memory is filled only later."""


def inheritance(memory: MemoryRecord, filled: ResolvedRuns, pages: Spans) -> Inheritance:
    """Return what a child has of a process under construction."""
    return Inheritance(inheritable(memory), filled, pages)


def plan_fill(
    stored: ResolvedRuns, wanted: Spans, keep: Spans, inherited: Inheritance
) -> Pages | None:
    """Return which pages must go, and which must be written; None: all, and there is nothing.

    Args:
        stored: all that the process has stored.
        wanted: the pages of that.
        keep: inherited mappings that stay.
        inherited: what was in them.
    """
    if inherited.runs is None or not keep:
        return None
    right = same_pages(inherited.runs, stored)
    return plan_pages(keep, inherited.pages, right, wanted)


def stored_pages(runs: ResolvedRuns) -> Spans:
    """Return the pages that the image holds the content of."""
    size, data = runs.page_size, int(Fate.DATA)
    found: Spans = []
    first = last = 0
    for start, n, fate in zip(runs.starts, runs.n_pages, runs.fates, strict=True):
        if fate != data:
            continue
        if start != last:
            if last:
                found.append((first, last))
            first = start
        last = start + n * size
    if last:
        found.append((first, last))
    return found


def same_pages(left: ResolvedRuns, right: ResolvedRuns) -> Spans:
    """Return the addresses at which both have the same stored page of the same generation."""
    size = left.page_size
    found: Spans = []
    i = j = 0
    while i < len(left) and j < len(right):
        start = max(left.starts[i], right.starts[j])
        left_end = left.starts[i] + left.n_pages[i] * size
        right_end = right.starts[j] + right.n_pages[j] * size
        end = min(left_end, right_end)
        if start < end and _origin(left, i) == _origin(right, j) is not None:
            found.append((start, end))
        i, j = (i + 1, j) if left_end < right_end else (i, j + 1)
    return join(found)


def _origin(runs: ResolvedRuns, index: int) -> tuple[int, int] | None:
    """Return what is equal for all runs that have the same pages at the same addresses."""
    if runs.fates[index] != Fate.DATA:
        return None
    first = runs.starts[index] // runs.page_size - runs.sources[index]
    return runs.generations[index], first
