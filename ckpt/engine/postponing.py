"""Which pages of a tree may come when it runs already, while it still stands still elsewhere; pure.

The source leaves them out of what it copies in the freeze; the destination has them served, like
those of a lazy restore (`lazy`, `guard`).
"""

from bisect import bisect_right
from collections.abc import Sequence

from ckpt.engine.lazy import LEAST_BYTES, may_wait
from ckpt.engine.records import TreeImage
from ckpt.resources.memory import VmaRecord
from ckpt.tracker.spans import Spans, intersect, join
from ckpt.units import AddrRange, Pid, RemoteAddr


def alone_in_memory(tree: TreeImage) -> set[Pid]:
    """Return the processes whose memory can be served: none shares it, the first thread lives.

    Who serves pages ends with the first thread; who shares the memory may need more.
    """
    sharers = {process.shares.memory for process in tree.processes}
    return {
        one.pid
        for one in tree.processes
        if one.has_memory and one.pid not in sharers and one.ended_leader is None
    }


def waiting_mappings(tree: TreeImage) -> dict[Pid, Spans]:
    """Return, of each process, the mappings whose pages may come later; not joined."""
    alone = alone_in_memory(tree)
    return {
        one.pid: [(v.start, v.end) for v in one.resources["memory"].vmas if may_wait(v)]
        for one in tree.processes
        if one.pid in alone
    }


def postpone(mappings: Spans, populated: Spans) -> Spans:
    """Return those mappings that have so many pages that these are worth coming later.

    Args:
        mappings: ascending; those that may wait.
        populated: the pages that exist.
    """
    n_bytes = [0] * len(mappings)
    starts = [start for start, _ in mappings]
    for start, end in intersect(populated, join(mappings)):
        at = start
        while at < end:
            index = bisect_right(starts, at) - 1
            stop = min(end, mappings[index][1])
            n_bytes[index] += stop - at
            at = stop
    return [span for span, n in zip(mappings, n_bytes, strict=True) if n >= LEAST_BYTES]


def split_mappings(
    vmas: Sequence[VmaRecord], missing: Spans
) -> tuple[list[AddrRange], list[AddrRange]]:
    """Return the mappings with pages that come later, and the others.

    Raises:
        ValueError: a page is said to come later that cannot.
    """
    waiting = [(vma.start, vma.end) for vma in vmas if may_wait(vma)]
    if intersect(missing, join(waiting)) != missing:
        raise ValueError("pages are missing that must be there at once")
    starts = [start for start, _ in missing]

    def has_missing(vma: VmaRecord) -> bool:
        index = bisect_right(starts, vma.end - 1) - 1
        return index >= 0 and missing[index][1] > vma.start

    lazy = [vma.span for vma in vmas if may_wait(vma) and has_missing(vma)]
    chosen = set(lazy)
    others = join([(vma.start, vma.end) for vma in vmas if vma.span not in chosen])
    return lazy, [AddrRange(RemoteAddr(start), RemoteAddr(end)) for start, end in others]
