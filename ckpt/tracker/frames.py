"""Witnesses that a page table is where it was: the frames of some of its pages.

mremap moves whole page tables where old and new addresses lie alike in them (2 MiB on x86-64), and
leaves the soft-dirty bits as they are: pages that nobody has written are clean at their new place,
and nothing else tells that they came. (Pages that it moves one by one become dirty.)

    epoch   table of 0x600000   | frame 71 | frame 72 | frame 73 | ...   two witnesses: 71, 73
    now     table of 0x600000   | frame 95 | frame 96 | frame 97 | ...   neither: it came from away

A frame that one address has to itself is nowhere else. So of each table a few are noted, and a
table of which no noted page is clean and still in its frame is not believed. The kernel may move a
page to another frame too (compaction, swap); such a table is stored once more than it had to be.

Kernel: mm/mremap.c, move_page_tables; bits 0-54, 56 and 63 of /proc/PID/pagemap. Frames can be read
with CAP_SYS_ADMIN; without it there is no witness, and nothing is believed.
"""

import contextlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ckpt.kernel import pagemap
from ckpt.kernel.libc import PAGE_SIZE
from ckpt.kernel.pagemap import ENTRY_BYTES, PM_FILE, PM_MMAP_EXCLUSIVE, PM_PRESENT, PM_SWAP
from ckpt.tracker.epoch import STATE_DIR
from ckpt.tracker.spans import Spans, intersect, join
from ckpt.units import Fd, Pid, addr_range

TABLE_BYTES = PAGE_SIZE * PAGE_SIZE // ENTRY_BYTES
"""How much memory one page table maps: it fills a page with entries of this size."""
N_WITNESSES = 16
"""Of each table, spread over it: some are clean unless almost all of it was written."""

_STRIDE = TABLE_BYTES // PAGE_SIZE // N_WITNESSES
_ADDRESS_LIMIT = 1 << 64
_FRAME = (1 << 55) - 1
_OWN = PM_PRESENT | PM_MMAP_EXCLUSIVE
_KIND = _OWN | PM_FILE | PM_SWAP

Witnesses = dict[int, list[tuple[int, int]]]
"""Address of a table -> addresses of pages in it, each with the frame that it alone has."""


def _path(pid: Pid) -> Path:
    return STATE_DIR / f"{pid}.frames"


def take(pid: Pid) -> Witnesses:
    """Return what `note` wrote for this process, once; nothing if there is nothing."""
    path = _path(pid)
    words = array("Q")
    with contextlib.suppress(OSError, ValueError):
        words.frombytes(path.read_bytes())
    with contextlib.suppress(OSError):
        path.unlink()
    witnesses: Witnesses = {}
    for address, frame in zip(words[::2], words[1::2], strict=False):
        witnesses.setdefault(address - address % TABLE_BYTES, []).append((address, frame))
    return witnesses


def note(pid: Pid, witnesses: Witnesses) -> None:
    """Write the witnesses of this process; where that fails, the next delta has none."""
    words = array("Q")
    for of_table in witnesses.values():
        for pair in of_table:
            words.extend(pair)
    with contextlib.suppress(OSError):
        STATE_DIR.mkdir(mode=0o700, exist_ok=True)
        _path(pid).write_bytes(words)


def confirm(
    read_table: Callable[[int], Sequence[int]], populated: Spans, clean: Spans, before: Witnesses
) -> tuple[Spans, Witnesses]:
    """Return the part of `clean` whose page tables are where they were, and new witnesses.

    Args:
        read_table: gives the words of pagemap of the `TABLE_BYTES` at an address.
        populated: pages that exist.
        clean: those of them whose soft-dirty bit was not set.
        before: the witnesses of the epoch.
    """
    believed: Spans = []
    witnesses: Witnesses = {}
    for table in _iter_tables(populated):
        entries = read_table(table)
        witnesses[table] = _choose(table, entries)
        if any(
            _frame_of(entries[(address - table) // PAGE_SIZE]) == frame and _holds(clean, address)
            for address, frame in before.get(table, ())
        ):
            believed.append((table, table + TABLE_BYTES))
    return intersect(clean, join(believed)), witnesses


def table_reader(fd: Fd) -> Callable[[int], Sequence[int]]:
    """Return what `confirm` reads page tables with: an open pagemap.

    It raises TargetGone when the process has ended.
    """
    return lambda table: pagemap.read_words(fd, addr_range(table, TABLE_BYTES))


def _iter_tables(spans: Spans) -> Iterator[int]:
    """Yield the address of each page table that maps a part of `spans`, once, ascending."""
    next_table = 0
    for start, end in spans:
        first = max(start - start % TABLE_BYTES, next_table)
        for table in range(first, end, TABLE_BYTES):
            yield table
            next_table = table + TABLE_BYTES


def _frame_of(entry: int) -> int:
    """Return the frame of a page that is mapped nowhere else, 0 for any other."""
    return entry & _FRAME if entry & _KIND == _OWN else 0


def _choose(table: int, entries: Sequence[int]) -> list[tuple[int, int]]:
    """Return pages that can be witnesses, spread over the table."""
    indexes: Sequence[int] = range(0, len(entries), _STRIDE)
    if not all(_frame_of(entries[i]) for i in indexes):
        own = [i for i, entry in enumerate(entries) if _frame_of(entry)]
        indexes = own[:: -(-len(own) // N_WITNESSES)] if own else []
    return [(table + i * PAGE_SIZE, _frame_of(entries[i])) for i in indexes]


def _holds(spans: Spans, address: int) -> bool:
    at = bisect_right(spans, (address, _ADDRESS_LIMIT)) - 1
    return at >= 0 and address < spans[at][1]
