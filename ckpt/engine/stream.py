"""What was copied, in the order of the page stream, and where the newest copy of each page is.

    entry        0 Copied            1 Copied      2 Alias
    pages        a b c d e f         b     e       of another space: no page here
    newest       a 6 c d 7 f         so after entry 1

Where the newest copies are is kept up as entries come, for each is little beside all that came
before: a migration asks for it while its tree stands still. Pure. Neighbours: `copying` fills it,
`pages` makes the tables of an image out of it, `sharing` says who stands for whom.
"""

from bisect import bisect_left
from collections.abc import Iterable

import attrs

from ckpt.tracker.spans import Spans, intersect, join, subtract, total_bytes, unite

Copies = list[tuple[int, int, int]]
"""Where copied pages are: start and end of their addresses, ordinal of the first in the stream;
ascending, disjoint."""


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


@attrs.define(slots=True, repr=False)
class _Space:
    """What is known of one address space."""

    entries: list[int] = attrs.Factory(list)
    """Their numbers in the stream: who asks for its own does not walk those of all others."""
    n_covered: int = 0
    """So many of its entries are in `covered`."""
    covered: Spans = attrs.Factory(list)
    n_laid: int = 0
    """So many of its entries are in `newest`."""
    newest: Copies = attrs.Factory(list)


class Stream:
    """All that was copied, of all address spaces, in the order of the page stream."""

    def __init__(self, entries: Iterable[Copied | Alias] = ()) -> None:
        """Begin with some."""
        self._entries: list[Copied | Alias] = []
        self._spaces: dict[str, _Space] = {}
        self._firsts: list[int] = []
        for entry in entries:
            self.append(entry)

    def append(self, entry: Copied | Alias) -> None:
        """Add what comes next; the spans of the one before are complete."""
        self._space(entry.space).entries.append(len(self._entries))
        self._entries.append(entry)

    def _space(self, name: str) -> _Space:
        return self._spaces.setdefault(name, _Space())

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._entries)

    def __getitem__(self, index: int) -> Copied | Alias:
        """Return one of them."""
        return self._entries[index]

    def of(self, space: str) -> list[tuple[int, Copied | Alias]]:
        """Return those of one address space, each with its number among all."""
        return [(index, self._entries[index]) for index in self._space(space).entries]

    def first_page(self, index: int, page_size: int) -> int:
        """Return the ordinal of the first page of an entry, behind which none will be changed."""
        firsts = self._firsts
        while len(firsts) <= index:
            before = self._entries[len(firsts) - 1] if firsts else None
            n_bytes = total_bytes(before.spans) if isinstance(before, Copied) else 0
            firsts.append((firsts[-1] if firsts else 0) + n_bytes // page_size)
        return firsts[index]

    def keep_up(self, page_size: int) -> None:
        """Find out what will be asked for, while there is time."""
        for space in self._spaces:
            self.covered(space)
            self.newest(space, page_size)

    def covered(self, space: str) -> Spans:
        """Return all that was copied of an address space, or that another one's copies stand for.

        State:  the spans of all entries are complete.
        """
        known = self._space(space)
        new = known.entries[known.n_covered :]
        if new:
            pieces = [span for index in new for span in self._entries[index].spans]
            known.covered = unite(known.covered, join(pieces))
            known.n_covered = len(known.entries)
        return known.covered

    def newest(self, space: str, page_size: int) -> Copies | None:
        """Return where the newest copy of each page is; None where others' copies stand for some.

        State:  the spans of all entries are complete.
        """
        known = self._space(space)
        for index in known.entries[known.n_laid :]:
            entry = self._entries[index]
            if not isinstance(entry, Copied):
                return None
            known.newest = lay_over(
                known.newest, entry.spans, self.first_page(index, page_size), page_size
            )
            known.n_laid += 1
        return known.newest


def all_copied(stream: Stream, space: str) -> Spans:
    """Return all that was copied of an address space."""
    return stream.covered(space)


def find_newest(stream: Stream, space: str, held: Spans, page_size: int) -> Copies:
    """Return where in the page stream the newest copy of each held page is, by address.

    Args:
        stream: all that was copied, of all address spaces, in the order of the page stream.
        space: whose pages.
        held: the pages wanted; each was copied once at least.
        page_size: in bytes.
    """
    newest = stream.newest(space, page_size)
    if newest is not None:
        gone = subtract(stream.covered(space), held)
        return lay_over(newest, gone, None, page_size) if gone else newest
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


def lay_over(copies: Copies, spans: Spans, first: int | None, page_size: int) -> Copies:
    """Return where copies are after newer ones of `spans` were made; a step for each span only.

    Args:
        copies: those before.
        spans: ascending, disjoint.
        first: ordinal of the first of the new pages in the stream; None: they are just gone.
        page_size: in bytes.
    """
    laid: Copies = []
    at = 0
    left: tuple[int, int, int] | None = None
    """What a span has left of the copy that it ended in: before `copies[at]`."""
    for start, end in spans:
        if left is None or left[1] <= start:
            if left is not None:
                laid.append(left)
                left = None
            behind = bisect_left(copies, (start,), at)
            laid += copies[at:behind]
            if behind > at and laid[-1][1] > start:
                left = laid.pop()
            at = behind
        if left is not None:
            if left[0] < start:
                laid.append((left[0], start, left[2]))
            left = _behind(left, end, page_size)
        if left is None:
            at, left = _pass(copies, at, end, page_size)
        if first is not None:
            laid.append((start, end, first))
            first += (end - start) // page_size
    if left is not None:
        laid.append(left)
    laid += copies[at:]
    return laid


def _behind(copy: tuple[int, int, int], end: int, page_size: int) -> tuple[int, int, int] | None:
    """Return what of a copy, that begins before `end`, lies behind it."""
    if copy[1] <= end:
        return None
    return end, copy[1], copy[2] + (end - copy[0]) // page_size


def _pass(
    copies: Copies, at: int, end: int, page_size: int
) -> tuple[int, tuple[int, int, int] | None]:
    """Return the first copy from `at` on that begins behind `end`, and what reaches beyond it."""
    behind = bisect_left(copies, (end,), at)
    return behind, _behind(copies[behind - 1], end, page_size) if behind > at else None


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
