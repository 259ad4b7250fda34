"""Contents of files on their way into an image and back: page spaces addressed by file offset.

    found by `resources/content.py`     read while all stand still     stored when they run again
    [hole][data      ][hole][data ]     only the data, into buffers    differs from the parent: DATA
                                                                       equal: PARENT; holes: ZERO

No tracker has a say: who else writes to shared memory, no address space knows. So a delta compares
each page with what the parent generation holds under the same name of a page space.

Back they come in the restorer, before any process exists: files are made without a name or under
one that nobody knows, filled from the image, and opened anew for each description and mapping.
Seals that would forbid the mappings, and names, they get when all processes are built.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

import attrs

from ckpt.engine.copying import CHUNK_BYTES, DropEqual, Pool
from ckpt.errors import RestoreFailed
from ckpt.image.reader import PageReader, Piece
from ckpt.image.runs import Fate, ResolvedRuns, RunTable, RunTableBuilder
from ckpt.image.writer import GenerationWriter
from ckpt.kernel.libc import readable_address, writable_address
from ckpt.resources.content import SHM, ContentKind, ContentRecord, Found, own_link
from ckpt.tracker.spans import Spans, subtract
from ckpt.units import AddrRange, Fd, RemoteAddr

_SEAL_WRITE, _SEAL_FUTURE_WRITE, _SEAL_EXEC = 0x8, 0x10, 0x20
_MFD_NOEXEC_SEAL = 0x8
_MAP_NORESERVE = 0x4000
_ANY_EXEC = 0o111


# -- into the image ------------------------------------------------------------------------------


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

    def __init__(self, writer: GenerationWriter, parent: PageReader | None) -> None:
        """Compare with what `parent` holds, if there is one."""
        self._writer = writer
        self._parent = parent
        self._pages: dict[str, int] = {}
        """Page space -> how many pages the file has."""
        self._drops: dict[str, DropEqual] = {}
        self._read: list[_Read] = []
        self._held: list[mmap.mmap] = []
        self._pool: Pool | None = None
        self._room: tuple[mmap.mmap, int] | None = None
        """The buffer that is being filled, and how far it is."""
        self._fates: dict[str, list[tuple[int, int, Fate, int]]] = {}

    def read(self, found: Iterable[Found], pool: Pool) -> None:
        """Read every file that was found.

        State: all processes of the tree stand still.

        What `pool` does not hold is compared, compressed and appended to the page stream meanwhile.

        Raises:
            OSError: one of them cannot be read.
        """
        self._pool = pool
        for one in found:
            record = one.record
            if record.kind == ContentKind.DIRECTORY:
                continue
            self._pages[record.space] = -(-record.size_bytes // self._page_size)
            self._fates[record.space] = []
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
        return self._writer.page_size

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
        assert self._pool is not None
        if self._room is None or self._room[1] == CHUNK_BYTES:
            if self._pool.is_empty():
                self.store()
            buffer = self._pool.take()
            self._held.append(buffer)
            self._room = (buffer, 0)
        return self._room

    def store(self) -> None:
        """Hand what was read, and is not as the parent has it, to the writer."""
        for one in self._read:
            view = memoryview(one.buffer)[one.at : one.at + one.end - one.start]
            whole = [(one.start, one.end)]
            fates = self._fates[one.space]
            kept = self._differing(one, view)
            fates += [(start, end, Fate.PARENT, 0) for start, end in subtract(whole, kept)]
            if kept:
                len_bytes = sum(end - start for start, end in kept)
                source = self._writer.write_pages(bytes(view[:len_bytes]))
                for start, end in kept:
                    fates.append((start, end, Fate.DATA, source))
                    source += (end - start) // self._page_size
        for buffer in self._held:
            assert self._pool is not None
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
        return {space: self._build(space, n_pages) for space, n_pages in self._pages.items()}

    def _build(self, space: str, n_pages: int) -> RunTable:
        builder = RunTableBuilder(self._page_size)
        at = 0
        for start, end, fate, source in sorted(self._fates[space]):
            builder.add(at, (start - at) // self._page_size, Fate.ZERO)
            builder.add(start, (end - start) // self._page_size, fate, source)
            at = end
        builder.add(at, n_pages - at // self._page_size, Fate.ZERO)
        return builder.build()


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
    with _mapped_end(record, fd, mmap.PROT_READ) as (address, len_bytes):
        if len_bytes:
            page[-len_bytes:] = ctypes.string_at(address, len_bytes)


@contextlib.contextmanager
def _mapped_end(record: ContentRecord, fd: Fd, prot: int) -> Iterator[tuple[int, int]]:
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


# -- and back ------------------------------------------------------------------------------------


@attrs.define(slots=True, eq=False, repr=False)
class _Made:
    record: ContentRecord
    fd: Fd
    temporary: str = ""
    """The name that it has until the end, if any."""


class Contents:
    """The files that a restore makes; a context manager, which takes back what nobody got.

    with Contents(records) as contents:
        options = attrs.evolve(options, contents=contents.paths)
        ...                     checks
        contents.fill(reader)
        ...                     everything is opened and built
        contents.finish()
        ...                     all are let go
    """

    def __init__(self, records: Sequence[ContentRecord]) -> None:
        """Take the records of all processes of the image."""
        self._records = records
        self._made: list[_Made] = []
        self._undo = contextlib.ExitStack()
        self.paths: dict[str, str] = {}
        """See `RestoreOptions.contents`."""

    def __enter__(self) -> Self:
        """Make all files, still empty.

        Raises:
            RestoreFailed: one cannot be made; none is left.
        """
        try:
            # Directories first: what was in one of them may come back, too.
            for record in sorted(self._records, key=_order):
                self._make(record)
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close our descriptors and remove names that were for the making only."""
        self._undo.close()

    def _make(self, record: ContentRecord) -> None:
        with _failures_of(record):
            made = _MAKERS[ContentKind(record.kind)](record, self._undo)
            self._undo.callback(os.close, made.fd)
            if record.kind not in (ContentKind.ANONYMOUS, ContentKind.DIRECTORY):
                os.truncate(made.fd, record.size_bytes)
            if record.kind == ContentKind.MEMFD and _mode_of(made.fd) != record.mode:
                # Before a seal forbids it.
                os.fchmod(made.fd, record.mode)
        self._made.append(made)
        path = made.temporary or own_link(made.fd)
        self.paths[record.key] = path
        if record.kind in (ContentKind.POSIX_SHM, ContentKind.DIRECTORY):
            self.paths[record.path] = path

    def resolve(self, reader: PageReader) -> list[ResolvedRuns]:
        """Return all runs of all contents, for a caller that checks only what it names."""
        return [reader.resolve(record.space) for record in self._records if _has_pages(record)]

    def fill(self, reader: PageReader) -> None:
        """Write the content of all files from frames that were checked; seal what can be sealed.

        Raises:
            RestoreFailed: the host has no room, or the image lacks a page space.
            ImageCorrupt: a frame does not decode.
        """
        for made in self._made:
            if not _has_pages(made.record):
                continue
            with _failures_of(made.record):
                runs = reader.resolve(made.record.space)
                _Filling(made).fill(reader, runs)
                if not _is_sealed_late(made.record):
                    _seal(made)
                    _give_up_writing(made)

    def finish(self) -> None:
        """Give them what they could not have before: late seals, names, owners, times.

        State: all processes are built, none runs.

        Raises:
            RestoreFailed: the kernel refused some of it.
        """
        for made in self._made:
            with _failures_of(made.record):
                if _is_sealed_late(made.record):
                    _seal(made)
                _set_attributes(made)
                if made.record.kind == ContentKind.POSIX_SHM:
                    os.rename(made.temporary, made.record.path)
                    made.temporary = ""
        # Names of directories, the innermost first.
        self._undo.close()


def _order(record: ContentRecord) -> tuple[bool, str]:
    return record.kind != ContentKind.DIRECTORY, record.path


def _has_pages(record: ContentRecord) -> bool:
    return record.kind != ContentKind.DIRECTORY


@contextlib.contextmanager
def _failures_of(record: ContentRecord) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = f"{record.kind} {record.path}".rstrip()
        raise RestoreFailed(f"making {name} anew", error.strerror or str(error)) from error


def _make_anonymous(record: ContentRecord, _undo: contextlib.ExitStack) -> _Made:
    """Map it, and open the file that the kernel has made for that, with the name it gives it."""
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    with mmap.mmap(-1, record.size_bytes, flags=flags) as mapped:
        address, len_bytes = writable_address(mapped)
        end = address + -(-len_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        path = f"/proc/self/map_files/{address:x}-{end:x}"
        return _Made(record, Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC)))


def _make_memfd(record: ContentRecord, _undo: contextlib.ExitStack) -> _Made:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if record.seals & _SEAL_EXEC and not record.mode & _ANY_EXEC:
        flags |= _MFD_NOEXEC_SEAL
    return _Made(record, Fd(os.memfd_create(record.path, flags)))


def _make_deleted(record: ContentRecord, undo: contextlib.ExitStack) -> _Made:
    """Make the file where it was, under its name if that is free, and remove the name.

    Shared memory keeps it until all have opened it: shm_open(3) leaves a flag that no link takes.
    """
    folder, name = os.path.split(record.path)
    with contextlib.ExitStack() as folders:
        _make_folders(folder, folders)
        if record.key.endswith(f":{_number_of_nameless(name):x}"):
            fd = Fd(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
        else:
            path, fd = _create(record.path)
            if path.startswith(SHM):
                made = _Made(record, fd, path)
                undo.callback(_remove_temporary, made)
                return made
            os.unlink(path)
    return _Made(record, fd)


def _number_of_nameless(name: str) -> int:
    """Return the inode number in the name that /proc gives to a file made by O_TMPFILE, or 0."""
    return int(name[1:]) if name.startswith("#") and name[1:].isdecimal() else 0


def _make_posix_shm(record: ContentRecord, undo: contextlib.ExitStack) -> _Made:
    """Make it under another name: until all is built, the old file stays what it is."""
    folder, name = os.path.split(record.path)
    path = os.path.join(folder, _spare_name(name))
    fd = Fd(os.open(path, _CREATING, 0o600))
    made = _Made(record, fd, path)
    undo.callback(_remove_temporary, made)
    return made


def _make_directory(record: ContentRecord, undo: contextlib.ExitStack) -> _Made:
    """Make it under its name: a process that works there enters it by that."""
    _make_folders(os.path.dirname(record.path), undo)
    os.mkdir(record.path, 0o700)
    undo.callback(_remove_folder, record.path)
    fd = os.open(record.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    return _Made(record, Fd(fd), record.path)


_MAKERS = {
    ContentKind.ANONYMOUS: _make_anonymous,
    ContentKind.MEMFD: _make_memfd,
    ContentKind.DELETED: _make_deleted,
    ContentKind.POSIX_SHM: _make_posix_shm,
    ContentKind.DIRECTORY: _make_directory,
}
_CREATING = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def _make_folders(path: str, undo: contextlib.ExitStack) -> None:
    """Make the directories that are missing, for as long as `undo` is not closed."""
    if path in ("", "/") or os.path.isdir(path):
        return
    _make_folders(os.path.dirname(path), undo)
    os.mkdir(path, 0o700)
    undo.callback(_remove_folder, path)


def _remove_folder(path: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _remove_temporary(made: _Made) -> None:
    if made.temporary:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made.temporary)


def _create(path: str) -> tuple[str, Fd]:
    """Create a file under a name, or beside it if somebody has that."""
    try:
        return path, Fd(os.open(path, _CREATING, 0o600))
    except FileExistsError:
        folder, name = os.path.split(path)
        path = os.path.join(folder, _spare_name(name))
        return path, Fd(os.open(path, _CREATING, 0o600))


_LONGEST_NAME = 200
"""Bytes that are kept of a name; 255 are allowed."""


_SPARE = re.compile(r"\.(.+)\.[0-9a-f]{16}")


def _spare_name(name: str) -> str:
    """Return a name that nobody has, and that does not grow from restore to restore."""
    own = _SPARE.fullmatch(name)
    if own:
        name = own[1]
    kept = os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])
    return f".{kept}.{secrets.token_hex(8)}"


@attrs.frozen(slots=True, eq=False, repr=False)
class _Filling:
    """Writes frames into one file; several threads may."""

    made: _Made

    def fill(self, reader: PageReader, runs: ResolvedRuns) -> None:
        """Write all data of the runs."""
        reader.for_each_frame(runs, self._put)

    def _put(self, raw: memoryview, pieces: list[Piece]) -> None:
        size_bytes = self.made.record.size_bytes
        for offset, at, len_bytes in pieces:
            wanted = min(len_bytes, size_bytes - offset)
            done = 0
            while done < wanted:
                done += os.pwrite(self.made.fd, raw[at + done : at + wanted], offset + done)
            behind = raw[at + wanted : at + len_bytes]
            if any(behind):
                self._put_behind_the_end(bytes(behind))

    def _put_behind_the_end(self, behind: bytes) -> None:
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        with _mapped_end(self.made.record, self.made.fd, prot) as (address, len_bytes):
            ctypes.memmove(address, behind, min(len_bytes, len(behind)))


def _is_sealed_late(record: ContentRecord) -> bool:
    """Tell whether its seals forbid mappings to be made that may exist."""
    return bool(record.seals & _SEAL_FUTURE_WRITE and not record.seals & _SEAL_WRITE)


def _seal(made: _Made) -> None:
    if made.record.kind == ContentKind.MEMFD:
        missing = made.record.seals & ~fcntl.fcntl(made.fd, fcntl.F_GET_SEALS)
        if missing:
            fcntl.fcntl(made.fd, fcntl.F_ADD_SEALS, missing)


def _give_up_writing(made: _Made) -> None:
    """Have it open for reading only: the kernel runs no program that somebody may write."""
    if made.record.mode & _ANY_EXEC and made.record.kind == ContentKind.DELETED:
        fd = os.open(own_link(made.fd), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.dup2(fd, made.fd, inheritable=False)
        finally:
            os.close(fd)


def _mode_of(fd: Fd) -> int:
    return stat.S_IMODE(os.fstat(fd).st_mode)


def _set_attributes(made: _Made) -> None:
    """Give a file of a file system its owner, mode and times."""
    record = made.record
    if record.kind == ContentKind.ANONYMOUS:
        return
    now = os.fstat(made.fd)
    if (now.st_uid, now.st_gid) != (record.uid, record.gid):
        os.fchown(made.fd, record.uid, record.gid)
    if _mode_of(made.fd) != record.mode:
        os.fchmod(made.fd, record.mode)
    os.utime(made.fd, ns=(record.accessed_ns, record.modified_ns))
