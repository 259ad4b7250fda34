"""Set algebra on sorted, disjoint, half-open byte ranges; pure.

A span list is `[(start, end), ...]`, ascending, disjoint, no empty range. Each operation is one
pass over both lists: a little Python per range, none per page.
"""

from bisect import bisect_right
from collections.abc import Iterable

import attrs

Spans = list[tuple[int, int]]


@attrs.frozen(slots=True, repr=False)
class Own:
    """The mappings whose pages can be the process's own; see `Spans` for their form."""

    anonymous: Spans
    mapped: Spans
    """Private mappings of files: only the pages that were copied on write are its own. Telling them
    costs four times as much, so it is asked only here (measured: 3.6 against 0.8 ms in 256 MiB)."""

    @property
    def all(self) -> Spans:
        """Both."""
        return join([*self.anonymous, *self.mapped])


def intersect(left: Spans, right: Spans) -> Spans:
    """Return what is in both."""
    result: Spans = []
    i = j = 0
    while i < len(left) and j < len(right):
        left_start, left_end = left[i]
        right_start, right_end = right[j]
        start = left_start if left_start > right_start else right_start
        end = left_end if left_end < right_end else right_end
        if start < end:
            result.append((start, end))
        if left_end < right_end:
            i += 1
        else:
            j += 1
    return result


def subtract(left: Spans, right: Spans) -> Spans:
    """Return what is in `left` and not in `right`."""
    result: Spans = []
    j = 0
    for left_start, left_end in left:
        start = left_start
        while j < len(right) and right[j][1] <= start:
            j += 1
        k = j
        while k < len(right) and right[k][0] < left_end:
            if right[k][0] > start:
                result.append((start, right[k][0]))
            start = max(start, right[k][1])
            k += 1
        if start < left_end:
            result.append((start, left_end))
    return result


def join(pieces: Iterable[tuple[int, int]]) -> Spans:
    """Return the sorted, disjoint form of any ranges; neighbours become one."""
    result: Spans = []
    for start, end in sorted(pieces):
        if start >= end:
            continue
        if result and start <= result[-1][1]:
            if end > result[-1][1]:
                result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result


def near(spans: Spans, wanted: Spans) -> Spans:
    """Return those of many spans that lie between the first and the last wanted."""
    first = bisect_right(spans, (wanted[0][0],)) - 1
    return spans[max(first, 0) : bisect_right(spans, (wanted[-1][1],))]


def total_bytes(spans: Spans) -> int:
    """Return how many bytes the ranges cover together."""
    return sum(end - start for start, end in spans)
