"""prctl: the numbers and the one struct that a checkpointer needs, and the call for ourselves.

On a target the calls are made inside it, as remote system calls; this module then only has the
numbers.

Source: prctl(2), include/uapi/linux/prctl.h.
"""

import contextlib
import ctypes
import enum
from collections.abc import Iterator
from typing import Final

from ckpt import fault
from ckpt.kernel.arch import NR
from ckpt.kernel.libc import syscall


class Prctl(enum.IntEnum):
    """PR_*: what can be read back from a task, and what sets it again."""

    SET_PDEATHSIG = 1
    GET_PDEATHSIG = 2
    GET_DUMPABLE = 3
    SET_DUMPABLE = 4
    GET_KEEPCAPS = 7
    SET_KEEPCAPS = 8
    SET_NAME = 15
    GET_NAME = 16
    GET_SECCOMP = 21
    SET_SECCOMP = 22
    CAPBSET_READ = 23
    CAPBSET_DROP = 24
    GET_TSC = 25
    SET_TSC = 26
    GET_SECUREBITS = 27
    SET_SECUREBITS = 28
    SET_TIMERSLACK = 29
    GET_TIMERSLACK = 30
    MCE_KILL = 33
    MCE_KILL_GET = 34
    SET_MM = 35
    SET_CHILD_SUBREAPER = 36
    GET_CHILD_SUBREAPER = 37
    SET_NO_NEW_PRIVS = 38
    GET_NO_NEW_PRIVS = 39
    GET_TID_ADDRESS = 40
    SET_THP_DISABLE = 41
    GET_THP_DISABLE = 42
    CAP_AMBIENT = 47
    GET_SPECULATION_CTRL = 52
    SET_SPECULATION_CTRL = 53
    SET_IO_FLUSHER = 57
    GET_IO_FLUSHER = 58
    SET_SYSCALL_USER_DISPATCH = 59
    SCHED_CORE = 62
    SET_MDWE = 65
    GET_MDWE = 66
    SET_MEMORY_MERGE = 67
    GET_MEMORY_MERGE = 68
    TIMER_CREATE_RESTORE_IDS = fault.number("timer-ids", 77)
    """6.15: lets timer_create take the id that it is given."""
    GET_AUXV = 0x41555856
    SET_VMA = 0x53564D41
    SET_PTRACER = 0x59616D61


class MmField(enum.IntEnum):
    """PR_SET_MM_*: the second argument of `SET_MM`."""

    START_CODE = 1
    END_CODE = 2
    START_DATA = 3
    END_DATA = 4
    START_STACK = 5
    START_BRK = 6
    BRK = 7
    ARG_START = 8
    ARG_END = 9
    ENV_START = 10
    ENV_END = 11
    AUXV = 12
    EXE_FILE = 13
    MAP = 14
    MAP_SIZE = 15


PR_CAP_AMBIENT_IS_SET: Final = 1
PR_CAP_AMBIENT_RAISE: Final = 2
PR_CAP_AMBIENT_LOWER: Final = 3
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

PR_MCE_KILL_CLEAR: Final = 0
PR_MCE_KILL_SET: Final = 1
PR_MCE_KILL_LATE: Final = 0
PR_MCE_KILL_EARLY: Final = 1
PR_MCE_KILL_DEFAULT: Final = 2

PR_SPEC_STORE_BYPASS: Final = 0
PR_SPEC_INDIRECT_BRANCH: Final = 1
PR_SPEC_L1D_FLUSH: Final = 2

PR_SET_VMA_ANON_NAME: Final = 0

PR_TIMER_CREATE_RESTORE_IDS_OFF: Final = 0
PR_TIMER_CREATE_RESTORE_IDS_ON: Final = 1
PR_TIMER_CREATE_RESTORE_IDS_GET: Final = 2

EXE_FD_UNCHANGED: Final = 0xFFFFFFFF
"""What `prctl_mm_map.exe_fd` holds to leave /proc/PID/exe alone."""


class prctl_mm_map(ctypes.Structure):  # noqa: N801
    """`struct prctl_mm_map`, the argument of `SET_MM`, `MAP`: all fields of the mm at once.

    `auxv` is an address in the task and `auxv_size` its length in bytes; 0 leaves it alone.
    """

    _fields_ = (
        ("start_code", ctypes.c_uint64),
        ("end_code", ctypes.c_uint64),
        ("start_data", ctypes.c_uint64),
        ("end_data", ctypes.c_uint64),
        ("start_brk", ctypes.c_uint64),
        ("brk", ctypes.c_uint64),
        ("start_stack", ctypes.c_uint64),
        ("arg_start", ctypes.c_uint64),
        ("arg_end", ctypes.c_uint64),
        ("env_start", ctypes.c_uint64),
        ("env_end", ctypes.c_uint64),
        ("auxv", ctypes.c_uint64),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    )


def prctl(option: Prctl, *args: int) -> int:
    """Call prctl for the calling thread of *this* process.

    Raises:
        OSError: EINVAL, an option or value that this kernel does not know; others by option.
    """
    return syscall(NR.prctl, option, *args)


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Be the one whom orphans among our descendants are given to, for the length of the block."""
    before = ctypes.c_int()
    prctl(Prctl.GET_CHILD_SUBREAPER, ctypes.addressof(before))
    prctl(Prctl.SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(Prctl.SET_CHILD_SUBREAPER, before.value)
