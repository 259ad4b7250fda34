"""Filters that a child of a test gives itself."""

import ctypes
import os
import struct

from ckpt.kernel.prctl import Prctl

ALLOW, USER_NOTIF = 0x7FFF_0000, 0x7FC0_0000
RETURN = 0x06
LOAD_IMMEDIATE, RETURN_LOADED = 0x00, 0x16
_SECCOMP_MODE_FILTER = 2
libc = ctypes.CDLL(None, use_errno=True)


class _Filter(ctypes.Structure):
    _fields_ = (("n", ctypes.c_ushort), ("code", ctypes.c_void_p))


def program(*instructions):
    """Return a filter of (code, k) pairs."""
    return b"".join(struct.pack("<HBBI", code, 0, 0, k) for code, k in instructions)


def confine(*programs):
    """Install filters, oldest first."""
    succeed(libc.prctl(Prctl.SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    for raw in programs:
        code = ctypes.create_string_buffer(raw, len(raw))
        described = _Filter(len(raw) // 8, ctypes.addressof(code))
        mode = Prctl.SET_SECCOMP, _SECCOMP_MODE_FILTER
        succeed(libc.prctl(*mode, ctypes.byref(described)))


def succeed(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
