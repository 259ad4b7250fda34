"""File handles: names of inodes that stay the same when a file is renamed.

Source: open_by_handle_at(2).
"""

import os
import struct
from typing import Final

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address, syscall
from ckpt.units import Fd

_HEADER: Final = struct.Struct("<Ii")
"""`struct file_handle` (include/linux/fs.h) up to the handle: its length in bytes, its type."""


def open_by_handle_at(mount_fd: int, handle_type: int, handle: bytes, flags: int) -> Fd:
    """Open the inode that a handle names, on the file system of `mount_fd`; closed on exec.

    Kernel: open_by_handle_at(2), 2.6.39, CAP_DAC_READ_SEARCH.

    Raises:
        OSError: ESTALE, there is no such inode (any more); EOPNOTSUPP, this file system cannot.
    """
    raw = _HEADER.pack(len(handle), handle_type) + handle
    address, _ = readable_address(raw)
    return Fd(syscall(NR.open_by_handle_at, mount_fd, address, flags | os.O_CLOEXEC))
