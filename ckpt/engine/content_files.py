"""Files that a restore makes, since the image holds their content (`resources/content.py`).

They are made in the restorer, before any process exists: without a name or under one that nobody
knows, filled from the image, and opened anew for each description and mapping. Seals that would
forbid the mappings, and names, they get when all processes are built. Neighbour: `contents`, the
way into the image.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import attrs

from ckpt.engine.contents import mapped_end
from ckpt.errors import RestoreFailed
from ckpt.image.reader import PageReader, Piece
from ckpt.image.runs import ResolvedRuns
from ckpt.kernel.libc import writable_address
from ckpt.resources.content import SHM, ContentKind, ContentRecord, own_link
from ckpt.units import Fd

_SEAL_WRITE, _SEAL_FUTURE_WRITE, _SEAL_EXEC = 0x8, 0x10, 0x20
_MFD_NOEXEC_SEAL = 0x8
_MAP_NORESERVE = 0x4000
_ANY_EXEC = 0o111


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

    @property
    def wait_for_pages(self) -> bool:
        """Tell whether any of them has content that is not there before `fill`."""
        return any(map(_has_pages, self._records))

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
        with mapped_end(self.made.record, self.made.fd, prot) as (address, len_bytes):
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
    """Have a program executable, and open for reading only: nothing else can be run."""
    if made.record.mode & _ANY_EXEC and made.record.kind == ContentKind.DELETED:
        _set_owner(made)
        fd = os.open(own_link(made.fd), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.dup2(fd, made.fd, inheritable=False)
        finally:
            os.close(fd)


def _mode_of(fd: Fd) -> int:
    return stat.S_IMODE(os.fstat(fd).st_mode)


def _set_attributes(made: _Made) -> None:
    """Give a file owner, mode and times."""
    if made.record.kind == ContentKind.ANONYMOUS:
        return
    _set_owner(made)
    os.utime(made.fd, ns=(made.record.accessed_ns, made.record.modified_ns))


def _set_owner(made: _Made) -> None:
    record = made.record
    now = os.fstat(made.fd)
    if (now.st_uid, now.st_gid) != (record.uid, record.gid):
        os.fchown(made.fd, record.uid, record.gid)
    if _mode_of(made.fd) != record.mode:
        os.fchmod(made.fd, record.mode)
