"""Set algebra on sorted, disjoint, half-open byte ranges; pure.

A span list is `[(start, end), ...]`, ascending, disjoint, no empty range. Each operation is one
pass over both lists: a little Python per range, none per page.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import chain

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
    append = result.append
    others = chain(right, _END)
    start, end = next(others)
    for left_start, left_end in left:
        while end <= left_start:
            start, end = next(others)
        while start < left_end:
            append(
                (
                    start if start > left_start else left_start,
                    end if end < left_end else left_end,
                )
            )
            if end > left_end:
                break
            start, end = next(others)
    return result


def subtract(left: Spans, right: Spans) -> Spans:
    """Return what is in `left` and not in `right`."""
    if not right:
        return list(left)
    result: Spans = []
    append = result.append
    others = chain(right, _END)
    start, end = next(others)
    for left_start, left_end in left:
        at = left_start
        while end <= at:
            start, end = next(others)
        while start < left_end:
            if start > at:
                append((at, start))
            at = end
            if end >= left_end:
                break
            start, end = next(others)
        if at < left_end:
            append((at, left_end))
    return result


def join(pieces: Iterable[tuple[int, int]]) -> Spans:
    """Return the sorted, disjoint form of any ranges; neighbours become one."""
    result: Spans = []
    append = result.append
    at, until = 0, -1
    for start, end in sorted(pieces):
        if start >= end:
            continue
        if start > until:
            if until >= 0:
                append((at, until))
            at, until = start, end
        elif end > until:
            until = end
    if until >= 0:
        append((at, until))
    return result


def unite(left: Spans, right: Spans) -> Spans:
    """Return what is in either; quick if one of them is short."""
    if len(left) < len(right):
        left, right = right, left
    if not right:
        return list(left)
    if len(right) * _FEW > len(left):
        return join([*left, *right])
    result: Spans = []
    at = 0
    for first, last in right:
        start, end = first, last
        behind = bisect_left(left, (start,), at)
        result += left[at:behind]
        at = behind
        if result and result[-1][1] >= start:
            start, before = result.pop()
            end = max(before, end)
        while at < len(left) and left[at][0] <= end:
            end = max(end, left[at][1])
            at += 1
        result.append((start, end))
    result += left[at:]
    return result


_END = ((1 << 65, 1 << 65),)
"""Behind all addresses."""
_FEW = 8
"""So many times longer one list must be for the other one's ranges to be looked up in it."""


def near(spans: Spans, wanted: Spans) -> Spans:
    """Return those of many spans that lie between the first and the last wanted."""
    first = bisect_right(spans, (wanted[0][0],)) - 1
    return spans[max(first, 0) : bisect_right(spans, (wanted[-1][1],))]


def total_bytes(spans: Spans) -> int:
    """Return how many bytes the ranges cover together."""
    return sum(end - start for start, end in spans)
