"""The file system, as far as images need it: atomic steps, modes, and errors with a meaning.

Every system call on an image goes through a `Store`, so that "whole or absent" can be read in one
place, and a test can let any single step fail or be the last one. `OSError` becomes `HostFull`,
`ImageUnusable` or `ImageCorrupt` here and nowhere above. Neighbours: `chain` and `writer` decide
which steps in which order; names given to this module are made by `format`, never taken from an
image.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import attrs

from ckpt.errors import CkptError, HostFull, ImageBusy, ImageCorrupt, ImageUnusable
from ckpt.image.access import require_trusted, require_trusted_way
from ckpt.image.format import HEADER_NAME, LOCK_NAME, TEMPORARY_PREFIX

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
"""An image holds everything the process knew, keys and passwords too."""

_STANDARD_ERROR = 2
_FULL = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
    }
)
_CANNOT_LINK = frozenset(
    {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EACCES}
)
"""What link(2) says where a file may not have, or get, another name."""
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO})
"""What opening says when the thing is absent or is not of the kind that it must be."""


def _meaning(error: OSError, path: Path, action: str) -> CkptError:
    """Return the error of ours that says what `error` means for the user."""
    text = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        return HostFull(
            f"cannot {action} {path}: {text}",
            "make room or choose another image directory; nothing was added to the chain",
        )
    return ImageUnusable(str(path), f"cannot {action} it: {text}")


@contextlib.contextmanager
def _errors(path: Path, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _meaning(error, path, action) from error


class Store:
    """The directory of one chain.

    A test may subclass it to fail at a step; every method that changes the disk is one step.
    """

    leaves_strays = False
    """Whether who is interrupted leaves page files that no manifest names, and no other sign."""

    def __init__(self, path: Path) -> None:
        """Stand for `path`; nothing is touched."""
        self.path = path
        self._is_wary = False

    # -- reading ---------------------------------------------------------------------------------

    def be_wary(self) -> None:
        """From now on read only what nobody but root and our own user can have written.

        Raises:
            ImageUntrusted: somebody can put another directory in the place of this one. (Reading
                raises it for a file or directory of his, or that he can write to.)
            ImageUnusable: what is above cannot be looked at.
        """
        self._is_wary = True
        with _errors(self.path, "find"):
            require_trusted_way(self.path)

    def refresh(self) -> None:
        """List anew from now on, where what was listed is remembered."""

    def read_names(self, *parts: str) -> list[str]:
        """Return the names in the directory, or in one below it, sorted.

        Raises:
            ImageUnusable: it is missing, no directory, or not readable.
        """
        path = self.path.joinpath(*parts)
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError as error:
            raise ImageUnusable(str(path), "there is no such directory") from error
        except NotADirectoryError as error:
            raise ImageUnusable(str(path), "this is a file, an image is a directory") from error
        except OSError as error:
            raise _meaning(error, path, "read") from error

    @contextlib.contextmanager
    def _opened(self, parts: tuple[str, ...]) -> Iterator[tuple[int, int]]:
        """Open a regular file for reading; no link is followed, no pipe or device waited for.

        Yields:
            The descriptor and the size in bytes.
        """
        path = self.path.joinpath(*parts)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with contextlib.ExitStack() as stack:
            try:
                at = self.path
                fd = os.open(at, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
                stack.callback(os.close, fd)
                status = self._look_at(fd, at)
                for part in parts:
                    at /= part
                    kind = os.O_DIRECTORY if at != path else 0
                    fd = os.open(part, flags | kind, dir_fd=fd)
                    stack.callback(os.close, fd)
                    status = self._look_at(fd, at)
            except OSError as error:
                if error.errno in _MISSING:
                    raise ImageCorrupt(str(path), "it is missing, or no regular file") from error
                raise _meaning(error, path, "open") from error
            if not stat.S_ISREG(status.st_mode):
                raise ImageCorrupt(str(path), "it is no regular file")
            yield fd, status.st_size

    def _look_at(self, fd: int, path: Path) -> os.stat_result:
        status = os.fstat(fd)
        if self._is_wary:
            require_trusted(status, path)
        return status

    def read_file(self, *parts: str, max_bytes: int) -> bytes:
        """Return the whole of a file of at most `max_bytes`.

        Raises:
            ImageCorrupt: it is missing, no regular file, or bigger.
            ImageUnusable: the system refuses to read it.
        """
        path = self.path.joinpath(*parts)
        with self._opened(parts) as (fd, size):
            if size > max_bytes:
                raise ImageCorrupt(str(path), f"it has {size} bytes, the limit is {max_bytes}")
            return self._read_exactly(fd, path, 0, size)

    def read_part(
        self,
        *parts: str,
        offset: int,
        len_bytes: int,
        size_bytes: int,
        into: bytearray | None = None,
    ) -> bytes | memoryview:
        """Return `len_bytes` from `offset` of a file that must have `size_bytes`.

        With `into` they are read into its start, and a view of it is returned.

        Raises:
            ImageCorrupt: it is missing, no regular file, or of another size.
            ImageUnusable: the system refuses to read it.
        """
        path = self.path.joinpath(*parts)
        with self._opened(parts) as (fd, size):
            if size != size_bytes:
                raise ImageCorrupt(
                    str(path), f"it has {size} bytes, its manifest says {size_bytes}"
                )
            if into is not None:
                return self._read_into(fd, path, offset, memoryview(into)[:len_bytes])
            return self._read_exactly(fd, path, offset, len_bytes)

    def _read_into(self, fd: int, path: Path, offset: int, room: memoryview) -> memoryview:
        done = 0
        while done < len(room):
            with _errors(path, "read"):
                n_bytes = os.preadv(fd, [room[done:]], offset + done)
            if not n_bytes:
                raise ImageCorrupt(str(path), "it became shorter while it was read")
            done += n_bytes
        return room

    def _read_exactly(self, fd: int, path: Path, offset: int, len_bytes: int) -> bytes:
        pieces: list[bytes] = []
        left = len_bytes
        while left:
            with _errors(path, "read"):
                piece = os.pread(fd, left, offset)
            if not piece:
                raise ImageCorrupt(str(path), "it became shorter while it was read")
            pieces.append(piece)
            offset += len(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    # -- writing ---------------------------------------------------------------------------------

    def make_root(self) -> bool:
        """Make the directory of the chain, mode 0700, if it is not there; tell whether it was made.

        Raises:
            ImageUnusable: its parent is missing, or it cannot be made.
        """
        try:
            self.path.mkdir(DIRECTORY_MODE)
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            if self.path.parent.is_dir():
                # What the kernel says where nothing can be made, as in /proc.
                raise _meaning(error, self.path, "make") from error
            raise ImageUnusable(
                str(self.path), f"the directory {self.path.parent} does not exist: make it first"
            ) from error
        except OSError as error:
            raise _meaning(error, self.path, "make") from error
        parent = self.path.absolute().parent
        with _errors(parent, "sync"):
            self._sync_path(parent)
        return True

    def remove_fresh(self, *, root: bool) -> None:
        """Remove a chain without generations that was just made, and with `root` its directory.

        State: nobody else can have written to it, since we hold its lock (or there is none yet).
        What cannot be removed stays: it must not hide the reason for the removal.
        """
        for name in (HEADER_NAME, LOCK_NAME):
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        if root:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def require_writable(self) -> None:
        """Find out before any work is done whether the directory can be written.

        Raises:
            ImageUnusable: it cannot, with the reason where there is one to be had.
        """
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise ImageUnusable(str(self.path), "it is not writable for you, or read-only")

    def make_directory(self, name: str) -> None:
        """Make a directory, mode 0700."""
        with _errors(self.path / name, "make"):
            (self.path / name).mkdir(DIRECTORY_MODE)

    def create_file(self, *parts: str) -> int:
        """Create a file that does not exist, mode 0600; return a descriptor for appending."""
        path = self.path.joinpath(*parts)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        with _errors(path, "create"):
            return os.open(path, flags, FILE_MODE)

    def append(self, fd: int, data: bytes | memoryview) -> None:
        """Write all of `data` at the end of the file."""
        view = memoryview(data)
        with _errors(self.path, "write to"):
            while view:
                view = view[os.write(fd, view) :]

    def sync_file(self, fd: int) -> None:
        """Wait until the file is on the disk, content and size."""
        with _errors(self.path, "write to"):
            os.fsync(fd)

    def close_file(self, fd: int) -> None:
        """Close a descriptor of `create_file`; some file systems are full only here."""
        with _errors(self.path, "write to"):
            os.close(fd)

    def sync_directory(self, name: str = ".") -> None:
        """Wait until the names in the directory are on the disk."""
        with _errors(self.path / name, "sync"):
            self._sync_path(self.path / name)

    def rename(self, name: str, new_name: str) -> None:
        """Give a finished file or directory its real name, in one step."""
        with _errors(self.path / new_name, "create"):
            (self.path / name).rename(self.path / new_name)

    def write_file(self, *parts: str, data: bytes) -> None:
        """Create a file with this content and wait until it is on the disk."""
        fd = self.create_file(*parts)
        try:
            self.append(fd, data)
            self.sync_file(fd)
        finally:
            self.close_file(fd)

    def replace_file(self, name: str, *, data: bytes) -> None:
        """Have a small file with this content on the disk, in one step; no temporary is left.

        State: inside `lock`.
        """
        temporary = TEMPORARY_PREFIX + name
        self.remove_temporary(temporary)
        try:
            self.write_file(temporary, data=data)
            self.rename(temporary, name)
        except BaseException:
            self.remove_temporary(temporary)
            raise
        self.sync_directory()

    def link_file(self, old: tuple[str, str], new: tuple[str, str]) -> bool:
        """Give a file another name; tell whether the file system can."""
        path = self.path.joinpath(*new)
        try:
            os.link(self.path.joinpath(*old), path, follow_symlinks=False)
        except OSError as error:
            if error.errno in _CANNOT_LINK:
                return False
            raise _meaning(error, path, "create") from error
        return True

    def remove_file(self, *parts: str) -> None:
        """Remove a file that nobody reads; what cannot be removed stays."""
        with contextlib.suppress(OSError):
            self.path.joinpath(*parts).unlink()

    def remove_temporary(self, name: str) -> None:
        """Remove something whose name begins with `.tmp-`; what cannot be removed stays.

        A temporary is never read, so a failure here must not hide the reason for the removal.
        """
        if not name.startswith(TEMPORARY_PREFIX):
            raise ValueError(f"{name} is not temporary")
        # Imported when needed: it is rare, and start-up counts.
        import shutil

        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()

    def _sync_path(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network file systems cannot do it for a directory, and say so this way.
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(fd)

    # -- locking ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def in_use(self) -> Iterator["InUse"]:
        """Be one of those who read: as long as there are any, nothing that they read is removed.

        The header is what is locked, shared: a reader may write nothing. Children that inherit the
        descriptor are readers too.

        Kernel: flock(2). Where a file system has no locks, nobody waits for anybody.
        """
        path = self.path / HEADER_NAME
        with _errors(path, "open"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        if fd <= _STANDARD_ERROR:
            # A standard stream of ours is closed: whoever asks for it must find that out.
            low, fd = fd, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _STANDARD_ERROR + 1)
            os.close(low)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH)
            yield InUse(self.path, fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer; the kernel gives the lock back when we die.

        Kernel: flock(2). The lock belongs to the open file description, so it is undone by name
        and not only by closing: a child that inherited the descriptor would keep it.

        Raises:
            ImageBusy: another process (or another `Chain` of this one) holds it.
            ImageUnusable: the lock file cannot be made.
        """
        path = self.path / LOCK_NAME
        with _errors(path, "open"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ImageBusy(str(self.path)) from error
            except OSError as error:
                raise _meaning(error, path, "lock") from error
            try:
                yield
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)


@attrs.frozen(repr=False)
class InUse:
    """What a reader holds, see `Store.in_use`."""

    _path: Path
    fd: int
    """Whoever holds a copy of it is a reader too."""

    def require_alone(self) -> None:
        """Find out whether anybody else reads.

        Raises:
            ImageBusy: somebody does.
        """
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ImageBusy(str(self._path)) from error
        except OSError:
            return
        fcntl.flock(self.fd, fcntl.LOCK_SH)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else reads; who comes in between waits for us."""
        with contextlib.suppress(OSError):
            fcntl.flock(self.fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_SH)
