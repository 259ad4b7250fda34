"""Directories for what a command needs only while it runs: gone at its end, or at the next one's.

Who is killed leaves his behind. So each is locked by whoever uses it, and whoever makes one removes
those that nobody has locked. The lock is on the directory itself, and not on a file in it: there is
no moment in which it is there, ours, and looks left behind for good.

    make        mkdir, open, flock; is it still there? it is ours until we end, however we do
    remove      open, ours and private, flock without waiting; what is in it goes, then itself

Neighbour: `stores` fetches into them.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator

from ckpt.errors import ImageUnusable

PREFIX = "ckpt-restore-"
_MODE = 0o700
_PLACE = "/var/tmp"
"""For big files that nobody keeps; /tmp is often memory."""
_FIRST_FD = 3
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def private_directory() -> Iterator[str]:
    """Lend an empty directory that nobody else can read; remove those of dead ones like us.

    Raises:
        ImageUnusable: there is no place for it.
    """
    folder = os.environ.get("TMPDIR") or _PLACE
    try:
        remove_leftovers(folder)
        path, fd = _make(folder)
    except OSError as error:
        raise ImageUnusable(folder, f"nothing can be fetched to there: {error.strerror}") from error
    try:
        yield path
    finally:
        _empty(fd)
        with contextlib.suppress(OSError):
            os.rmdir(path)
        os.close(fd)


def _make(folder: str) -> tuple[str, int]:
    # Imported when needed: start-up counts, and hardly any command needs one.
    import tempfile

    while True:
        path = tempfile.mkdtemp(prefix=PREFIX, dir=folder)
        with contextlib.suppress(FileNotFoundError):
            fd = _open(path)
            # Who looks for leftovers may have found it before it was locked.
            if _lock(fd, fcntl.LOCK_EX) and _is_at(fd, path):
                return path, fd
            os.close(fd)


def _open(path: str) -> int:
    """Open a directory as none of the standard streams: one may be closed, which is to be seen."""
    low = os.open(path, _DIRECTORY)
    try:
        return fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
    finally:
        os.close(low)


def _lock(fd: int, how: int) -> bool:
    """Lock a directory; tell whether it is not another one's.

    Kernel: flock(2). It goes with the last descriptor, also of one that was killed.
    """
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks: nobody will find it unlocked either.
        return how == fcntl.LOCK_EX
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def remove_leftovers(folder: str) -> None:
    """Remove directories of ours in `folder` that nobody uses; what cannot be removed stays.

    Raises:
        OSError: the folder cannot be read.
    """
    for name in os.listdir(folder):
        if name.startswith(PREFIX):
            with contextlib.suppress(OSError):
                _remove_leftover(os.path.join(folder, name))


def _remove_leftover(path: str) -> None:
    fd = os.open(path, _DIRECTORY)
    try:
        status = os.fstat(fd)
        is_ours = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == _MODE
        if is_ours and _lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _empty(fd)
            os.rmdir(path)
    finally:
        os.close(fd)


def _empty(fd: int) -> None:
    """Remove what is in a directory, wherever it is now; no link is followed."""
    import shutil

    for name in os.listdir(fd):
        try:
            os.unlink(name, dir_fd=fd)
        except OSError:
            shutil.rmtree(name, ignore_errors=True, dir_fd=fd)
