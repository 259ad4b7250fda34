"""The mappings at the epoch: a soft-dirty bit is believed only in a mapping that is as it was.

A mapping that grew, or that a new neighbour was merged into, is dirty as a whole, by a mark on the
mapping. As long as it bears the mark the kernel does without the bits of its pages: mprotect to
read-only and back makes them writable at once, and a write then sets no bit. When mprotect merges
the mapping with another one, the marks of all but one of them are lost:

    epoch             | 0 .. 39 rw | 40 .. 43 r | 44 .. 63 rw |      all clean
    munmap, mmap 0-3  | 0 .. 39 rw, marked      |             |
    mprotect 20-23 r, rw, write 20                                   no bit is set
    mprotect 40-43 rw | 0 .. 63 rw, no mark                   |      20 reads as clean

No merge leaves the mappings as they were, so what was merged, split, moved or resized since the
epoch counts as written. A program that has its very same mappings back at the next dump, after
merges in between, is not noticed: nothing in the kernel tells of it.

Kernel: mm/mprotect.c, mprotect_fixup and can_change_pte_writable; seen on 6.1 and 6.12.
"""

import contextlib
from pathlib import Path

from ckpt.kernel.procfs import maps
from ckpt.tracker.epoch import STATE_DIR
from ckpt.tracker.spans import Spans, join
from ckpt.units import Pid

Layout = frozenset[tuple[int, int, str]]
"""Start, end and protection (`rw-p`) of each private mapping."""


def _path(pid: Pid) -> Path:
    return STATE_DIR / f"{pid}.layout"


def read_layout(pid: Pid) -> Layout:
    """Return the mappings of a frozen process.

    Raises:
        TargetGone: the process ended.
    """
    return frozenset(
        (int(vma.span.start), int(vma.span.end), vma.perms)
        for vma in maps.read_maps(pid)
        if not vma.shared
    )


def take(pid: Pid) -> Layout:
    """Return what `note` wrote for this process, once; nothing if there is nothing."""
    path = _path(pid)
    mappings = []
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            start, end, perms = line.split()
            mappings.append((int(start, 16), int(end, 16), perms))
    with contextlib.suppress(OSError):
        path.unlink()
    return frozenset(mappings)


def note(pid: Pid, layout: Layout) -> None:
    """Write the mappings of this process; where that fails, the next delta believes none."""
    text = "".join(f"{start:x} {end:x} {perms}\n" for start, end, perms in layout)
    with contextlib.suppress(OSError):
        STATE_DIR.mkdir(mode=0o700, exist_ok=True)
        _path(pid).write_text(text)


def steady(before: Layout, now: Layout) -> Spans:
    """Return the mappings that are as they were; pure."""
    return join((start, end) for start, end, _ in before & now)
