"""The one door to the kernel: raw system calls, and the addresses of our own buffers.

Everything in `ckpt.kernel` that Python's `os` has no call for goes through `syscall` here. The
module knows no call by name and turns no error: that is `ckpt.kernel.failures`' part.
"""

import ctypes
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")
"""Bytes in a page of this machine."""

_MAX_ARGS = 6

_libc = ctypes.CDLL(None, use_errno=True)
_raw_syscall = _libc.syscall
_raw_syscall.restype = ctypes.c_long
# Without argtypes ctypes would pass every int as a 32-bit one.
_raw_syscall.argtypes = [ctypes.c_long] * (1 + _MAX_ARGS)

_ZEROS = tuple((0,) * n for n in range(_MAX_ARGS, -1, -1))


def syscall(nr: int, *args: int) -> int:
    """Make one system call in this process and return its result.

    At most six arguments; missing ones are 0. An argument is passed as one 64-bit word, so
    addresses and unsigned values up to 2**64 - 1 are right, and so is -1. The caller keeps every
    buffer whose address it passes alive until this returns. Other Python threads run meanwhile.

    Source: syscall(2).

    Raises:
        OSError: the call failed; errno and its text are set.
    """
    result: int = _raw_syscall(nr, *args, *_ZEROS[len(args)])
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return result


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 << 20


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, in *this* process: first touch of fresh pages is dear.

    Source: mallopt(3). A libc without it does as it likes.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _KEPT_BYTES)


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` of CPython's stable ABI (3.11 on): only `buf` and `len` are of interest."""

    buf: int | None
    len: int
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_PYBUF_SIMPLE = 0
_PYBUF_WRITABLE = 1

_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_PyBuffer)]
_release_buffer.restype = None


def _locate(buffer: object, flags: int) -> tuple[int, int]:
    view = _PyBuffer()
    _get_buffer(buffer, ctypes.byref(view), flags)
    try:
        return view.buf or 0, view.len
    finally:
        _release_buffer(ctypes.byref(view))


def readable_address(buffer: "ReadableBuffer") -> tuple[int, int]:
    """Return (address, length in bytes) of the memory behind a contiguous buffer.

    The address holds for as long as the caller keeps the object and does not resize it.

    Raises:
        BufferError: the buffer is not contiguous.
        TypeError: the object is no buffer.
    """
    return _locate(buffer, _PYBUF_SIMPLE)


def writable_address(buffer: "WriteableBuffer") -> tuple[int, int]:
    """Return (address, length in bytes) of a buffer that the kernel may write into.

    The address holds for as long as the caller keeps the object and does not resize it.

    Raises:
        BufferError: the buffer is read-only or not contiguous.
        TypeError: the object is no buffer.
    """
    return _locate(buffer, _PYBUF_WRITABLE)
