"""Classic packet filters of sockets: SO_GET_FILTER and SO_ATTACH_FILTER.

    struct sock_filter   8 bytes an instruction: code, jt, jf, k
    struct sock_fprog    u16 len; struct sock_filter *filter

Source: include/uapi/linux/filter.h, socket(7), `sk_get_filter` of the kernel: a length of 0 asks
for the number of instructions, which is the call's result in `optlen`.
"""

import ctypes
import struct
from typing import Final

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address, syscall, writable_address

SIZE: Final = 8
"""Bytes of one instruction."""
MAX_INSTRUCTIONS: Final = 4096
"""BPF_MAXINSNS."""

_SOL_SOCKET: Final = 1
_SO_ATTACH_FILTER: Final = 26
_SO_GET_FILTER: Final = 26
_FPROG: Final = struct.Struct("@HP")


def read(fd: int) -> bytes:
    """Return the instructions of a socket's filter; empty if it has none.

    Raises:
        OSError: EACCES, the filter is an eBPF program; others, the family has no filters.
    """
    n_instructions = _get(fd, bytearray(SIZE), 0)
    if not n_instructions:
        return b""
    code = bytearray(n_instructions * SIZE)
    _get(fd, code, n_instructions)
    return bytes(code)


def _get(fd: int, code: bytearray, n_instructions: int) -> int:
    length = ctypes.c_uint32(n_instructions)
    address, _ = writable_address(code)
    where = ctypes.addressof(length)
    syscall(NR.getsockopt, fd, _SOL_SOCKET, _SO_GET_FILTER, address, where)
    return length.value


def attach(fd: int, code: bytes) -> None:
    """Give a socket a filter of these instructions.

    Raises:
        OSError: EINVAL, the kernel does not take it; EPERM, the socket's filter is locked.
    """
    address, _ = readable_address(code)
    program = _FPROG.pack(len(code) // SIZE, address)
    where, size = readable_address(program)
    syscall(NR.setsockopt, fd, _SOL_SOCKET, _SO_ATTACH_FILTER, where, size)
