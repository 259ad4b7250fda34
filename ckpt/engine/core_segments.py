"""Which parts of an address space a core file holds, and where; pure.

    VMA       | anonymous          | file, unchanged here | file, changed here | PROT_NONE |
    fates       DDDDZZZZDDDD         FFDDFFFFFF             FFDDFFFF             ZZZZ
    held        ############         ##########               ##                 (nothing)
    segments    one                  one                    two                  one, empty

What is not held has no bytes in the core file, and a debugger takes it from the file that NT_FILE
names, as it does with a core file of the kernel (core(5)): a file mapping of which no page is the
process's own. Of those the first page is held if it is an ELF header, like there: by it a debugger
finds the build-id.

Zeros are held, as holes: no disk block. But nobody has read what lies in an inaccessible mapping,
and no file could be as long as the address space that some programs reserve.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import attrs

from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.kernel.elf_core import PF_R, PF_W, PF_X
from ckpt.resources.vmas import PROT_EXEC, PROT_READ, PROT_WRITE

_RESERVED_BYTES = 64 << 30
"""A part of a mapping that is this long and zero is not held."""


class Mapped(Protocol):
    """What is needed of a mapping, whatever it is of."""

    @property
    def start(self) -> int:
        """Its first address."""
        ...

    @property
    def end(self) -> int:
        """The address behind it."""
        ...

    @property
    def prot(self) -> int:
        """PROT_* bits."""
        ...


@attrs.frozen(slots=True)
class Segment:
    """Neighbouring pages of one mapping: those up to `held_end` are in the core file."""

    start: int
    held_end: int
    end: int
    flags: int
    """PF_* bits."""
    offset: int
    """In the core file, from where memory begins."""


Part = tuple[int, int, bool]
"""Start and end of addresses, and whether the core file holds them."""


def iter_private_parts(
    vma: Mapped, runs: ResolvedRuns, *, file_is_here: bool, has_elf_header: bool
) -> Iterator[Part]:
    """Yield the parts of a private mapping, ascending.

    Args:
        vma: the mapping.
        runs: its pages, no others.
        file_is_here: what is still the file's own can be read.
        has_elf_header: so can its first page, and it is worth it.
    """
    size = runs.page_size
    has_own = any(fate == Fate.DATA for fate in runs.fates)
    for start, n, fate in zip(runs.starts, runs.n_pages, runs.fates, strict=True):
        end = start + n * size
        if fate != Fate.FILE:
            empty = fate == Fate.ZERO and (not vma.prot or end - start >= _RESERVED_BYTES)
            yield start, end, not empty
        elif has_own and file_is_here:
            yield start, end, True
        else:
            first = start + (size if has_elf_header and start == vma.start else 0)
            yield start, first, True
            yield first, end, False


def plan_segments(mapped: Iterable[tuple[Mapped, Iterable[Part]]]) -> list[Segment]:
    """Lay the parts of all mappings, both ascending, one behind the other."""
    segments: list[Segment] = []
    offset = 0
    for vma, parts in mapped:
        flags = _flags_of(vma.prot)
        last: Segment | None = None
        for start, end, held in parts:
            if start == end:
                continue
            if last is not None and (not held or last.held_end == last.end):
                held_end = end if held else last.held_end
                last = segments[-1] = attrs.evolve(last, held_end=held_end, end=end)
            else:
                last = Segment(start, end if held else start, end, flags, offset)
                segments.append(last)
            offset += end - start if held else 0
    return segments


def _flags_of(prot: int) -> int:
    return (
        (PF_R if prot & PROT_READ else 0)
        | (PF_W if prot & PROT_WRITE else 0)
        | (PF_X if prot & PROT_EXEC else 0)
    )


def held_bytes(segments: Sequence[Segment]) -> int:
    """Return how long all that is held is together."""
    return sum(segment.held_end - segment.start for segment in segments)


class Places:
    """Finds where in the core file an address is."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        """Take the segments, ascending."""
        self._segments = segments
        self._starts = [segment.start for segment in segments]

    def iter_parts(self, address: int, len_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Cut what begins at an address where mappings end.

        Yields:
            Offset in the core file, offset behind `address`, length, all in bytes; only of what is
            held.
        """
        end = address + len_bytes
        index = max(bisect_right(self._starts, address) - 1, 0)
        while index < len(self._segments) and (segment := self._segments[index]).start < end:
            index += 1
            start, stop = max(address, segment.start), min(end, segment.held_end)
            if start < stop:
                yield segment.offset + start - segment.start, start - address, stop - start
