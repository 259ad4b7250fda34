"""inotify: instances of our own, and watches of anybody's that we have a descriptor of.

Source: inotify(7), inotify_init1(2), inotify_add_watch(2), inotify_rm_watch(2).
"""

import fcntl
import os
import struct
import termios
from pathlib import Path
from typing import Final

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address, syscall
from ckpt.units import Fd

IN_ACCESS: Final = 0x1
IN_MODIFY: Final = 0x2
IN_ATTRIB: Final = 0x4
IN_DELETE_SELF: Final = 0x400
IN_Q_OVERFLOW: Final = 0x4000
IN_IGNORED: Final = 0x8000
IN_EXCL_UNLINK: Final = 0x0400_0000
IN_DONT_FOLLOW: Final = 0x0200_0000
IN_MASK_CREATE: Final = 0x1000_0000
IN_ONESHOT: Final = 0x8000_0000
IN_CLOEXEC: Final = 0o2000000
IN_NONBLOCK: Final = 0o4000

EVENT_HEADER: Final = struct.Struct("<iIII")
"""`struct inotify_event` up to its name: watch, mask, cookie, length of the name in bytes."""

_MAX_QUEUED = Path("/proc/sys/fs/inotify/max_queued_events")


def inotify_init() -> Fd:
    """Return a new instance, closed on exec.

    Raises:
        OSError: EMFILE, the user has as many as fs.inotify.max_user_instances allows.
    """
    return Fd(syscall(NR.inotify_init1, IN_CLOEXEC))


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """Watch what is under `path`; return the number of the watch.

    A new watch gets the number after the highest that this instance has ever given.

    Raises:
        OSError: ENOENT; EEXIST, it is watched already and `mask` has IN_MASK_CREATE (4.18);
            ENOSPC, the user has as many as fs.inotify.max_user_watches allows.
    """
    name = os.fsencode(path) + b"\0"
    address, _ = readable_address(name)
    return syscall(NR.inotify_add_watch, fd, address, mask)


def inotify_rm_watch(fd: int, watch: int) -> None:
    """Remove a watch; one event (IN_IGNORED) is queued."""
    syscall(NR.inotify_rm_watch, fd, watch)


def count_unread_bytes(fd: int) -> int:
    """Return how many bytes of events are queued."""
    (n_bytes,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(n_bytes)


def read_max_queued_events() -> int:
    """Return after how many events a new instance's queue overflows."""
    return int(_MAX_QUEUED.read_text())
