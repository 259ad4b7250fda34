"""Files that a command writes for somebody else to read: whole, or as they were before."""

import os

from ckpt.errors import UsageError


def require_place(option: str, path: str) -> None:
    """Refuse a path that cannot be written, before any work is done for it.

    Raises:
        UsageError: it is a directory, or its own directory is not there or not writable.
    """
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise UsageError(f"{option}: {path} is a directory, give the name of a file")
    if not os.path.isdir(folder):
        raise UsageError(f"{option}: there is no directory {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{option}: no file can be made in {folder}")


def replace_file(path: str, text: str) -> None:
    """Put `text` into the file at `path` in one step; who reads it sees the old or the new one.

    Raises:
        OSError: as the kernel says it; the old file is untouched.
    """
    # Beside it, since a rename cannot leave the file system; with a dot, since collectors take all
    # files of a directory that they know the suffix of.
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:200]}.{os.getpid()}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
