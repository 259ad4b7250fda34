"""Contents of files on their way into an image: page spaces addressed by file offset.

    found by `resources/content.py`     read while all stand still     stored when they run again
    [hole][data      ][hole][data ]     only the data, into buffers    differs from the parent: DATA
                                                                       equal: PARENT; holes: ZERO

No tracker has a say: who else writes to shared memory, no address space knows. So a delta compares
each page with what the parent generation holds under the same name of a page space. The way back is
in `content_files`.
"""

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Iterator

import attrs

from ckpt.engine.copying import CHUNK_BYTES, Copy, DropEqual, Pool
from ckpt.engine.pages import IN_PARENT, build_file_runs
from ckpt.engine.stream import Copies
from ckpt.image.reader import PageReader
from ckpt.image.runs import RunTable
from ckpt.kernel.libc import readable_address
from ckpt.resources.content import ContentKind, ContentRecord, Found
from ckpt.tracker.spans import Spans, join, subtract
from ckpt.units import AddrRange, Fd, RemoteAddr


@attrs.frozen(slots=True, eq=False, repr=False)
class _Read:
    """Data of one file, in a buffer."""

    space: str
    start: int
    end: int
    buffer: mmap.mmap
    at: int
    """Where in the buffer."""


class ContentCopy:
    """The contents of one generation: `read` while the tree stands, then `store`, then `tables`."""

    def __init__(self, copy: Copy, parent: PageReader | None, likely_bytes: int) -> None:
        """Touch buffers for about so much; compare with what `parent` holds, if there is one."""
        self._copy = copy
        self._parent = parent
        self._pool = Pool(likely_bytes)
        self._pages: dict[str, int] = {}
        """Page space -> how many pages the file has."""
        self._drops: dict[str, DropEqual] = {}
        self._read: list[_Read] = []
        self._held: list[mmap.mmap] = []
        self._room: tuple[mmap.mmap, int] | None = None
        """The buffer that is being filled, and how far it is."""
        self._copies: dict[str, Copies] = {}

    def read(self, found: Iterable[Found]) -> None:
        """Read every file that was found.

        State: all processes of the tree stand still.

        More than the buffers hold is compared, compressed and stored meanwhile.

        Raises:
            OSError: one of them cannot be read.
        """
        for one in found:
            record = one.record
            if record.kind == ContentKind.DIRECTORY:
                continue
            self._pages[record.space] = -(-record.size_bytes // self._page_size)
            self._copies[record.space] = []
            if self._parent is not None and record.space in self._parent.manifest.spaces:
                self._drops[record.space] = DropEqual(self._parent, record.space)
            fd = _open_quietly(one.opened_at)
            try:
                for start, end in _iter_data(fd, record.size_bytes, self._page_size):
                    self._read_part(record, fd, start, end)
            finally:
                os.close(fd)

    @property
    def _page_size(self) -> int:
        return self._copy.page_size

    def _read_part(self, record: ContentRecord, fd: Fd, start: int, end: int) -> None:
        while start < end:
            buffer, at = self._make_room()
            stop = min(end, start + CHUNK_BYTES - at)
            view = memoryview(buffer)[at : at + stop - start]
            done = os.preadv(fd, [view], start)
            if done < len(view):
                # The end of the file, or of what a signal let us read.
                done = _read_rest(fd, view, start, done)
                view[done:] = bytes(len(view) - done)
                if start + done == record.size_bytes:
                    _add_behind_the_end(record, fd, view)
            self._read.append(_Read(record.space, start, stop, buffer, at))
            self._room = (buffer, at + stop - start)
            start = stop

    def _make_room(self) -> tuple[mmap.mmap, int]:
        if self._room is None or self._room[1] == CHUNK_BYTES:
            if self._pool.is_empty():
                self.store()
            buffer = self._pool.take()
            self._held.append(buffer)
            self._room = (buffer, 0)
        return self._room

    def store(self) -> None:
        """Hand on what was read and is not as the parent has it."""
        for one in self._read:
            view = memoryview(one.buffer)[one.at : one.at + one.end - one.start]
            whole = [(one.start, one.end)]
            copies = self._copies[one.space]
            kept = self._differing(one, view)
            copies += [(start, end, IN_PARENT) for start, end in subtract(whole, kept)]
            if kept:
                len_bytes = sum(end - start for start, end in kept)
                source = self._copy.store_other(one.space, kept, bytes(view[:len_bytes]))
                for start, end in kept:
                    copies.append((start, end, source))
                    source += (end - start) // self._page_size
        for buffer in self._held:
            self._pool.give_back(buffer)()
        self._read, self._held, self._room = [], [], None

    def _differing(self, one: _Read, view: memoryview) -> Spans:
        """Return what differs from the parent's, moved together at the front of the view."""
        drop = self._drops.get(one.space)
        if drop is None:
            return [(one.start, one.end)]
        span = AddrRange(RemoteAddr(one.start), RemoteAddr(one.end))
        kept, _ = drop.compact([span], view)
        return kept

    def tables(self) -> dict[str, RunTable]:
        """Return the run table of each page space; everything has been stored."""
        return {
            space: build_file_runs(n_pages, sorted(self._copies[space]), self._page_size)
            for space, n_pages in self._pages.items()
        }

    def held(self) -> dict[str, Spans]:
        """Return the pages of each page space that are no holes; everything has been stored."""
        return {
            space: join((start, end) for start, end, _ in copies)
            for space, copies in self._copies.items()
        }


def _open_quietly(path: str) -> Fd:
    """Open for reading; without a trace in the time of last access, if we may."""
    try:
        return Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME))
    except PermissionError:
        return Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _iter_data(fd: Fd, size_bytes: int, page_size: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file that are no holes, in whole pages."""
    end = 0
    while end < size_bytes:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        hole = min(os.lseek(fd, start, os.SEEK_HOLE), size_bytes)
        start = max(end, start // page_size * page_size)
        end = -(-hole // page_size) * page_size
        if start < end:
            yield start, end


def _read_rest(fd: Fd, view: memoryview, start: int, done: int) -> int:
    while done < len(view) and (n := os.preadv(fd, [view[done:]], start + done)):
        done += n
    return done


def _add_behind_the_end(record: ContentRecord, fd: Fd, page: memoryview) -> None:
    """Add what lies in the last page behind the end of the file: who has it mapped can see it."""
    with mapped_end(record, fd, mmap.PROT_READ) as (address, len_bytes):
        if len_bytes:
            page[-len_bytes:] = ctypes.string_at(address, len_bytes)


@contextlib.contextmanager
def mapped_end(record: ContentRecord, fd: Fd, prot: int) -> Iterator[tuple[int, int]]:
    """Lend address and length of what lies behind the end of a file in its last page."""
    used = record.size_bytes % mmap.PAGESIZE
    if not used:
        yield 0, 0
        return
    first = record.size_bytes - used
    with mmap.mmap(fd, used, flags=mmap.MAP_SHARED, prot=prot, offset=first) as mapped:
        view = memoryview(mapped)
        yield readable_address(view)[0] + used, mmap.PAGESIZE - used
        view.release()
