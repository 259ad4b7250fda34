"""A disk that does not answer: whoever opens a file there waits, in state D, until it is let go.

with held_disk(tmp_path / "disk") as disk:
    disk.hold("pages-*")     from the first file or directory on that is called so
    disk.await_held(end)     somebody waits by now; False if `end`, a pidfd, has ended before
    disk.let_go()            whatever is opened is open at once, from here on

Such a wait ends by SIGKILL, and by no signal that has a handler. Kernel: fanotify(7).
"""

import contextlib
import ctypes
import fnmatch
import os
import select
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

_FAN_CLOEXEC, _FAN_CLASS_CONTENT = 0x1, 0x4
_FAN_MARK_ADD, _FAN_MARK_MOUNT = 0x1, 0x10
_FAN_OPEN_PERM, _FAN_ONDIR = 0x10000, 0x4000_0000
_FAN_ALLOW = 0x1
_AT_FDCWD = -100
_EVENT = struct.Struct("IBBHQii")
_LIBC = ctypes.CDLL(None, use_errno=True)


class Disk:
    """A mounted file system with somebody who is asked about each open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def hold(self, name: str) -> None:
        """Be asked; `await_held` lets through what comes before one of this name (fnmatch)."""
        flags = _FAN_CLOEXEC | _FAN_CLASS_CONTENT
        self._fd = _checked(_LIBC.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC))
        mask = ctypes.c_uint64(_FAN_OPEN_PERM | _FAN_ONDIR)
        where = (_AT_FDCWD, os.fsencode(self.path))
        _checked(_LIBC.fanotify_mark(self._fd, _FAN_MARK_ADD | _FAN_MARK_MOUNT, mask, *where))
        self._name = name

    def await_held(self, end: int) -> bool:
        """Wait until somebody does; False if the process of a pidfd has ended instead."""
        while True:
            ready, _, _ = select.select([self._fd, end], [], [], 60)
            if self._fd not in ready:
                return False
            raw = os.read(self._fd, _EVENT.size)
            opened = _EVENT.unpack(raw)[5]
            name = os.path.basename(os.readlink(f"/proc/self/fd/{opened}"))
            is_wanted = fnmatch.fnmatch(name, self._name)
            if not is_wanted:
                os.write(self._fd, struct.pack("iI", opened, _FAN_ALLOW))
            os.close(opened)
            if is_wanted:
                return True

    def let_go(self) -> None:
        """Ask no more; all that wait go on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


@contextlib.contextmanager
def held_disk(path: Path) -> Iterator[Disk]:
    """Mount one for the length of the block."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    disk = Disk(path)
    try:
        yield disk
    finally:
        disk.let_go()
        subprocess.run(["umount", path], check=True)
