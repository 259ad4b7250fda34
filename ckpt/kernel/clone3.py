"""clone3's argument block. Data only: the call itself is made by the target or the seed.

Source: include/uapi/linux/sched.h, clone3(2).
"""

import ctypes
import enum
from collections.abc import Sequence
from typing import Final

from ckpt.units import RemoteAddr, Tid


class CloneFlag(enum.IntFlag):
    """CLONE_*, without the exit signal that shares their word in the older calls."""

    NEWTIME = 0x80
    VM = 0x100
    FS = 0x200
    FILES = 0x400
    SIGHAND = 0x800
    PIDFD = 0x1000
    PTRACE = 0x2000
    VFORK = 0x4000
    PARENT = 0x8000
    THREAD = 0x10000
    NEWNS = 0x20000
    SYSVSEM = 0x40000
    SETTLS = 0x80000
    PARENT_SETTID = 0x100000
    CHILD_CLEARTID = 0x200000
    DETACHED = 0x400000
    UNTRACED = 0x800000
    CHILD_SETTID = 0x1000000
    NEWCGROUP = 0x2000000
    NEWUTS = 0x4000000
    NEWIPC = 0x8000000
    NEWUSER = 0x10000000
    NEWPID = 0x20000000
    NEWNET = 0x40000000
    IO = 0x80000000
    CLEAR_SIGHAND = 0x100000000
    INTO_CGROUP = 0x200000000


class clone_args(ctypes.Structure):  # noqa: N801
    """`struct clone_args` as of 5.7; every member is 64 bits, addresses included."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("pidfd", ctypes.c_uint64),
        ("child_tid", ctypes.c_uint64),
        ("parent_tid", ctypes.c_uint64),
        ("exit_signal", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("stack_size", ctypes.c_uint64),
        ("tls", ctypes.c_uint64),
        ("set_tid", ctypes.c_uint64),
        ("set_tid_size", ctypes.c_uint64),
        ("cgroup", ctypes.c_uint64),
    )


CLONE_ARGS_SIZE_VER0: Final = 64
CLONE_ARGS_SIZE_VER1: Final = 80
"""With set_tid (5.5)."""
CLONE_ARGS_SIZE_VER2: Final = 88
"""With cgroup (5.7)."""


_NULL = RemoteAddr(0)
_NO_FLAGS = CloneFlag(0)


def pack_clone_args(
    *,
    flags: CloneFlag = _NO_FLAGS,
    exit_signal: int = 0,
    stack: RemoteAddr = _NULL,
    stack_size: int = 0,
    tls: int = 0,
    pidfd: RemoteAddr = _NULL,
    child_tid: RemoteAddr = _NULL,
    parent_tid: RemoteAddr = _NULL,
    set_tid: RemoteAddr = _NULL,
    n_set_tid: int = 0,
) -> bytes:
    """Return the argument block, 80 bytes (CLONE_ARGS_SIZE_VER1, what set_tid needs).

    Args:
        flags: what is shared.
        exit_signal: sent to the parent; 0 with THREAD or PARENT.
        stack: lowest address of the new stack; 0 to go on with the old one's copy.
        stack_size: bytes.
        tls: the new FS base (x86-64), with SETTLS.
        pidfd: where to store a pidfd, with PIDFD.
        child_tid: address in the child, with CHILD_SETTID or CHILD_CLEARTID.
        parent_tid: address in the parent, with PARENT_SETTID.
        set_tid: address of an array of `pid_t`, innermost pid namespace first.
        n_set_tid: its length; 0 lets the kernel choose.
    """
    args = clone_args(
        flags=int(flags),
        pidfd=pidfd,
        child_tid=child_tid,
        parent_tid=parent_tid,
        exit_signal=exit_signal,
        stack=stack,
        stack_size=stack_size,
        tls=tls,
        set_tid=set_tid,
        set_tid_size=n_set_tid,
    )
    return bytes(args)[:CLONE_ARGS_SIZE_VER1]


def pack_set_tid(tids: Sequence[Tid]) -> bytes:
    """Return the array that `set_tid` points to: 4 bytes each, innermost pid namespace first."""
    return b"".join(tid.to_bytes(4, "little", signed=True) for tid in tids)
