"""An image held against the memory that it was made of, byte by byte, and against its parent.

State: the process has done nothing since the dump. It waits for its next command, on one processor
(`settle_on_one_cpu`), or the kernel would go on writing into its rseq area.
"""

import mmap
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import attrs

from ckpt.image.chain import Chain
from ckpt.image.format import Manifest
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate
from ckpt.units import addr_range

PAGE = mmap.PAGESIZE
NOTHING = bytes(PAGE)

_PRESENT, _SWAPPED, _FILE = 1 << 63, 1 << 62, 1 << 61
_MARKER = 0x1F
"""The swap type of what is no page (`ckpt.kernel.pagemap`)."""


def settle_on_one_cpu(pid: int) -> None:
    for tid in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(tid), {min(os.sched_getaffinity(pid))})


@attrs.frozen
class Stored:
    """What one generation says of its pages; sets hold page addresses."""

    mapped: frozenset[int]
    """All of them."""
    data: frozenset[int]
    parent: frozenset[int]
    zeros: frozenset[int]
    """Of `data`: those of zeros, where the parent generation had nothing but zeros."""
    same: frozenset[int]
    """Of `data`: those whose other bytes the parent generation had as well."""


@attrs.frozen
class Image:
    """An image directory, opened anew for each look, and the process that it is of."""

    directory: Path
    pid: int

    @property
    def space(self) -> str:
        return f"mm-{self.pid}"

    def manifest(self, number: int) -> Manifest:
        return Chain.open(self.directory).manifest(number)

    def parent_of(self, number: int) -> int | None:
        parent = self.manifest(number).parent
        return None if parent is None else parent.generation

    def stored(self, number: int) -> Stored:
        """Read what a generation stores, and what of that its parent had."""
        reader = PageReader(Chain.open(self.directory), number)
        table = reader.manifest.spaces[self.space]
        data, parent = _pages_of(table, {Fate.DATA}), _pages_of(table, {Fate.PARENT})
        mapped = _pages_of(table, set(Fate))
        before = self.parent_of(number)
        if before is None:
            return Stored(mapped, data, parent, frozenset(), frozenset())
        now = self._content(reader, data)
        then = self._content(PageReader(Chain.open(self.directory), before), data)
        same = frozenset(page for page in data if now[page] == then.get(page))
        zeros = frozenset(page for page in same if now[page] == NOTHING)
        return Stored(mapped, data, parent, zeros, same - zeros)

    def _content(self, reader: PageReader, pages: frozenset[int]) -> dict[int, bytes]:
        """Return the content of those of `pages` that are the process's own, or zeros."""
        wanted = [addr_range(page, PAGE) for page in sorted(pages)]
        content = {
            page: NOTHING
            for run in reader.resolve(self.space).clip(wanted)
            if run.fate is not Fate.FILE
            for page in range(run.start, run.start + run.n_pages * PAGE, PAGE)
        }
        for raw, pieces in reader.iter_data(self.space, wanted):
            for start, offset, length in pieces:
                for at in range(0, length, PAGE):
                    content[start + at] = bytes(raw[offset + at : offset + at + PAGE])
        return content

    def differences(self, number: int, vanishing: set[int]) -> list[str]:
        """Return, one line each, the pages whose content is not what the process has now.

        Args:
            number: the generation.
            vanishing: pages that the kernel may have taken away meanwhile (MADV_FREE).
        """
        reader = PageReader(Chain.open(self.directory), number)
        wrong: list[str] = []
        with _Memory(self.pid) as memory:
            for raw, pieces in reader.iter_data(self.space):
                for start, offset, length in pieces:
                    wrong += _differing(memory, start, raw[offset : offset + length], vanishing)
            for run in reader.resolve(self.space):
                if run.fate in (Fate.ZERO, Fate.FILE):
                    wrong += _not_empty(memory, run.start, run.n_pages, run.fate, vanishing)
        return wrong


def _pages_of(table, fates) -> frozenset[int]:
    return frozenset(
        page
        for run in table
        if run.fate in fates
        for page in range(run.start, run.start + run.n_pages * PAGE, PAGE)
    )


class _Memory:
    """Memory and page tables of a process; looking never makes a page exist."""

    def __init__(self, pid: int) -> None:
        self.mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        self.pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.mem)
        os.close(self.pagemap)

    def there(self, start: int, n_pages: int) -> list[bool]:
        """Tell for each page whether it exists and is not a file's."""
        words = array("Q", os.pread(self.pagemap, n_pages * 8, start // PAGE * 8))
        return [_is_there(word) for word in words] if any(words) else [False] * n_pages

    def read(self, start: int, n_bytes: int) -> bytes:
        return os.pread(self.mem, n_bytes, start)


def _is_there(word: int) -> bool:
    if word & _SWAPPED and word & 0x1F == _MARKER:
        return False
    return bool(word & (_PRESENT | _SWAPPED)) and not word & _FILE


def _differing(memory, start, stored, vanishing) -> Iterator[str]:
    there = memory.there(start, len(stored) // PAGE)
    if all(there) and memory.read(start, len(stored)) == stored:
        return
    for index, is_there in enumerate(there):
        address = start + index * PAGE
        now = memory.read(address, PAGE) if is_there else NOTHING
        if now != stored[index * PAGE : (index + 1) * PAGE] and address not in vanishing:
            state = "other bytes" if is_there else "no page"
            yield f"{address:#x}: the image holds content, the process has {state}"


def _not_empty(memory, start, n_pages, fate, vanishing) -> Iterator[str]:
    for index, is_there in enumerate(memory.there(start, n_pages)):
        address = start + index * PAGE
        if not is_there or address in vanishing:
            continue
        if fate is Fate.FILE or memory.read(address, PAGE) != NOTHING:
            yield f"{address:#x}: the image says {fate.name}, the process has content"
