"""What is mapped and filled now, made into what is wanted: which of it can stay. Pure.

A process under construction may have memory already: a child has its parent's, copied on write by
the kernel; what is sent to another host was mapped and filled by the rounds before.

    now       [heap          ][libs    ]   [table ]
    wanted    [heap     ]     [libs    ]   [other ]   [new]
    keep      [heap     ]     [libs    ]
    unmap                [   ]             [table ]
    new                                    [other ]   [new]

    pages there          ##########
    that are right       ####  ####         what is shared on write stays so
    wanted               ########  ##       (of what is kept)
    drop                         ##         madvise(MADV_DONTNEED): zeros, or the file's own
    write                    ##    ##

Nothing here runs once per page, and nothing moves: what is right lies where it must lie.

One mapping that is wanted must be one when all is done, for mremap does not work across two. The
kernel makes one of new memory and its neighbour only where that has never been forked (`joins`):
a forked one is kept whole or in part, but nothing is added to it.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence

import attrs

from ckpt.tracker.spans import Spans, intersect, join, subtract

_WORTH_DROPPING_BYTES = 32 << 10
"""From which on wrong pages are dropped before they are written: it saves the kernel's copy of what
is shared, and costs a call."""


@attrs.frozen(slots=True)
class Mapping:
    """One mapping: now, or as it is wanted."""

    start: int
    end: int
    backing: Hashable
    """What no call can change: private or shared, which file, what only mmap or advice before any
    page is there can give."""
    offset_bytes: int | None = None
    """Of its first page in the file, if there is one."""
    prot: int = 0
    """PROT_* bits."""
    joins: bool = True
    """The kernel makes one of it and of new memory beside it; asked of what is there now."""

    def is_like(self, other: "Mapping") -> bool:
        """Tell whether a page of both could be the same page, or one go on as the other."""
        if self.backing != other.backing:
            return False
        if self.offset_bytes is None or other.offset_bytes is None:
            return self.offset_bytes is other.offset_bytes
        return self.offset_bytes - self.start == other.offset_bytes - other.start


@attrs.frozen(slots=True)
class Part:
    """A part of a wanted mapping."""

    index: int
    """Which one, in the order given."""
    start: int
    end: int


@attrs.frozen(slots=True)
class Remapping:
    """How what is mapped becomes what is wanted: `unmap` first, then `new` and `protect`."""

    keep: Spans
    unmap: Spans
    new: tuple[Part, ...]
    protect: tuple[Part, ...]
    """Kept, and wanted with another protection."""


def plan_remapping(
    now: Sequence[Mapping], wanted: Sequence[Mapping], others: Spans | None = None
) -> Remapping:
    """Return which mappings stay, and what has to be done about all others.

    Args:
        now: what is mapped, ascending and disjoint.
        wanted: what shall be mapped, and nothing else: ascending and disjoint.
        others: what is mapped, or may be, of which no more is known; it may contain all of `now`.
    """
    now = list(_iter_joined(now))
    kept: list[tuple[int, int]] = []
    new: list[Part] = []
    protect: list[Part] = []
    first = 0
    for index, mapping in enumerate(wanted):
        while first < len(now) and now[first].end <= mapping.start:
            first += 1
        part, prot = _find_kept(now, first, index, mapping)
        if part is None:
            new.append(Part(index, mapping.start, mapping.end))
            continue
        kept.append((part.start, part.end))
        if prot != mapping.prot:
            protect.append(part)
        gaps = (Part(index, mapping.start, part.start), Part(index, part.end, mapping.end))
        new += [gap for gap in gaps if gap.start < gap.end]
    keep = join(kept)
    mapped = join([*((one.start, one.end) for one in now), *(others or ())])
    return Remapping(keep, subtract(mapped, keep), tuple(new), tuple(protect))


def _iter_joined(now: Iterable[Mapping]) -> Iterator[Mapping]:
    """Yield what the kernel has made one of, as one."""
    last: Mapping | None = None
    for one in now:
        joins = last is not None and last.end == one.start and last.prot == one.prot
        if last is not None and joins and last.joins and one.joins and last.is_like(one):
            last = attrs.evolve(last, end=one.end)
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


def _find_kept(
    now: Sequence[Mapping], first: int, index: int, wanted: Mapping
) -> tuple[Part | None, int]:
    """Return the most of a wanted mapping that can stay, and its protection; None: nothing can.

    Only a part of one mapping, since two that are there already never become one.
    """
    best: Part | None = None
    prot = 0
    while first < len(now) and now[first].start < wanted.end:
        one = now[first]
        first += 1
        start, end = max(one.start, wanted.start), min(one.end, wanted.end)
        if not one.is_like(wanted):
            continue
        if not one.joins and (start, end) != (wanted.start, wanted.end):
            continue
        if best is None or end - start > best.end - best.start:
            best, prot = Part(index, start, end), one.prot
    return best, prot


@attrs.frozen(slots=True)
class Pages:
    """What becomes of the pages of the wanted mappings."""

    write: Spans
    """What must be put there; nothing of it is there after `drop`, but for `over`."""
    drop: Spans
    """What must go, or should, before anything is written."""
    over: Spans
    """What is written over something else."""


def plan_pages(keep: Spans, there: Spans, right: Spans, wanted: Spans) -> Pages:
    """Return what is left to be done for pages.

    Args:
        keep: mappings that stay; all others have no pages yet.
        there: pages that were put there, or may be.
        right: those that are what is wanted.
        wanted: pages that must have some content; any other must have none.
    """
    write = subtract(wanted, intersect(keep, right))
    wrong = subtract(intersect(keep, there), right)
    drop = subtract(wrong, wanted)
    again = intersect(wrong, wanted)
    long = [(start, end) for start, end in again if end - start >= _WORTH_DROPPING_BYTES]
    return Pages(write, join([*drop, *long]), subtract(again, long))
