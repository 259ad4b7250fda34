"""Files that the destination lacks (`--with-file`): sent before the offer, and again if changed.

    source                                   destination
    FileBegins, FilePart ... ──────────────> a file beside its place; then it is there, or is equal
    Offer                                    to the one that is
      ...
    the tree stands still: those that were written to since, in the same way, before its Tree

Parts of one file come in order; pages may come between them. What was made there is removed again
unless the tree runs there. Neighbours: `source` has a `Carrier`, `arrival` a `Carried`.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import attrs

from ckpt.errors import FileChanged, Finding, HostFull, ProtocolError, UsageError
from ckpt.migrate.channel import Channel
from ckpt.migrate.messages import FileBegins, FilePart

_PART_BYTES = 1 << 20
_MOST_BYTES = 1 << 34
"""Of all files of a migration."""
_MOST_FILES = 1000
_MOST_MODE = 0o7777


class Carrier:
    """Sends files of the source."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Look at them.

        Raises:
            UsageError: one of them is not there, or no regular file.
        """
        self._paths = tuple(dict.fromkeys(map(os.path.abspath, paths)))
        self._sent: dict[str, tuple[int, ...]] = {}
        if len(self._paths) > _MOST_FILES:
            raise UsageError(f"--with-file: more than {_MOST_FILES} files")
        n_bytes = 0
        for path in self._paths:
            with _open_regular(path) as fd:
                n_bytes += os.fstat(fd).st_size
        if n_bytes > _MOST_BYTES:
            raise UsageError(f"--with-file: more than {_MOST_BYTES >> 30} GiB")

    def send(self, channel: Channel) -> None:
        """Send those that are not there as they are now.

        Raises:
            UsageError: one of them is no regular file any more.
            MigrateError: the destination was lost, or refuses.
        """
        for path in self._paths:
            if path in self._sent and not os.path.lexists(path):
                # The tree itself has removed it: nobody there will look for it.
                continue
            with _open_regular(path) as fd:
                # Before it is read: what is written meanwhile is sent once more.
                status = os.fstat(fd)
                told = _identity(status)
                if self._sent.get(path) != told:
                    _send(channel, path, fd, status)
                    self._sent[path] = told


def _identity(status: os.stat_result) -> tuple[int, ...]:
    who = status.st_mode, status.st_uid, status.st_gid
    return status.st_ino, status.st_size, status.st_mtime_ns, *who


@contextlib.contextmanager
def _open_regular(path: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"--with-file {path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"--with-file {path}: is no regular file")
        yield fd
    finally:
        os.close(fd)


def _send(channel: Channel, path: str, fd: int, status: os.stat_result) -> None:
    channel.send(
        FileBegins(
            path=path,
            size=status.st_size,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            atime_ns=status.st_atime_ns,
            mtime_ns=status.st_mtime_ns,
        )
    )
    at = 0
    while at < status.st_size:
        wanted = min(_PART_BYTES, status.st_size - at)
        # One that is cut meanwhile is sent once more, too.
        data = os.pread(fd, wanted, at) or bytes(wanted)
        channel.send(FilePart(data))
        at += len(data)


@attrs.define(repr=False)
class _Coming:
    """One file on its way in."""

    told: FileBegins
    fd: int
    made: str
    left: int


class Carried:
    """Files that come to the destination; a context manager, which removes what is not kept."""

    def __init__(self, peer: str) -> None:
        """Expect none."""
        self._peer = peer
        self._coming: _Coming | None = None
        self._n_bytes = 0
        self._ours: dict[str, os.stat_result] = {}
        """What we have made."""
        self.paths: set[str] = set()
        """All that are here with the content that they have there."""

    def begin(self, told: FileBegins) -> None:
        """Take the word that a file comes.

        Raises:
            ProtocolError: there cannot be such a file.
            FileChanged: it cannot be made here.
            HostFull: no room.
        """
        self._check(told)
        made = os.path.join(os.path.dirname(told.path), f".ckpt-{os.urandom(8).hex()}")
        with _trouble_with(told.path):
            fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._coming = _Coming(told, fd, made, told.size)
        if not told.size:
            self._finish(self._coming)

    def _check(self, told: FileBegins) -> None:
        self._n_bytes += max(told.size, 0)
        who = (told.uid, told.gid)
        wrong = (
            self._coming is not None
            or not told.path.startswith("/")
            or os.path.normpath(told.path) != told.path
            or "\0" in told.path
            or told.size < 0
            or not 0 <= told.mode <= _MOST_MODE
            or not 0 <= min(who) <= max(who) < (1 << 32) - 1
            or min(told.atime_ns, told.mtime_ns) < 0
            or self._n_bytes > 2 * _MOST_BYTES
            or len(self.paths) > _MOST_FILES
        )
        if wrong:
            raise ProtocolError(peer=self._peer, reason="a file that cannot be")

    def take(self, part: FilePart) -> None:
        """Take the next part of it.

        Raises:
            ProtocolError: no file is coming, or no more of it.
            FileChanged: another file is there.
            HostFull: no room.
        """
        coming = self._coming
        if coming is None or not 0 < len(part.data) <= min(coming.left, _PART_BYTES):
            raise ProtocolError(peer=self._peer, reason="a part of no file")
        with _trouble_with(coming.told.path):
            view = memoryview(part.data)
            while view:
                view = view[os.write(coming.fd, view) :]
        coming.left -= len(part.data)
        if not coming.left:
            self._finish(coming)

    def _finish(self, coming: _Coming) -> None:
        told = coming.told
        with _trouble_with(told.path):
            os.fchown(coming.fd, told.uid, told.gid)
            os.fchmod(coming.fd, told.mode)
            os.utime(coming.fd, ns=(told.atime_ns, told.mtime_ns))
            self._place(coming)
        self.paths.add(told.path)
        self._drop()

    def _place(self, coming: _Coming) -> None:
        path = coming.told.path
        status = os.fstat(coming.fd)
        if self._is_ours(path):
            os.rename(coming.made, path)
        else:
            try:
                os.link(coming.made, path)
            except FileExistsError:
                if _is_equal(coming.fd, path):
                    return
                raise FileChanged((Finding(path, _OTHER, _REMEDY),)) from None
        self._ours[path] = status

    def _is_ours(self, path: str) -> bool:
        with contextlib.suppress(OSError):
            return path in self._ours and os.path.samestat(os.lstat(path), self._ours[path])
        return False

    def _drop(self) -> None:
        """Forget what is coming, and its file beside."""
        coming, self._coming = self._coming, None
        if coming is not None:
            os.close(coming.fd)
            with contextlib.suppress(OSError):
                os.unlink(coming.made)

    def keep(self) -> None:
        """Leave here what was made: the tree runs here."""
        self._ours.clear()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what was not kept."""
        self._drop()
        for path in self._ours:
            if self._is_ours(path):
                with contextlib.suppress(OSError):
                    os.unlink(path)


_OTHER = "was sent by the source (--with-file), and another file is there"
_REMEDY = "move it out of the way"


@contextlib.contextmanager
def _trouble_with(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HostFull(path, "make room on its file system") from error
        text = f"was sent by the source, and cannot be made here ({error.strerror})"
        raise FileChanged((Finding(path, text),)) from error


def _is_equal(fd: int, path: str) -> bool:
    """Tell whether a file has the same content as one that is open."""
    other = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status, size = os.fstat(other), os.fstat(fd).st_size
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return False
        pieces = range(0, size, _PART_BYTES)
        return all(os.pread(fd, _PART_BYTES, n) == os.pread(other, _PART_BYTES, n) for n in pieces)
    finally:
        os.close(other)
