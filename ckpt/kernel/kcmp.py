"""kcmp: whether two processes share a kernel object, and an order by which to group the shared.

Source: kcmp(2), include/uapi/linux/kcmp.h; needs CONFIG_KCMP.
"""

import ctypes
import enum

from ckpt.kernel.arch import NR
from ckpt.kernel.failures import failures_of
from ckpt.kernel.libc import syscall
from ckpt.units import Pid, Tid


class KcmpType(enum.IntEnum):
    """KCMP_*: the kind of object that is compared."""

    FILE = 0
    VM = 1
    FILES = 2
    FS = 3
    SIGHAND = 4
    IO = 5
    SYSVSEM = 6
    EPOLL_TFD = 7


class Ordering(enum.IntEnum):
    """What kcmp answers; the order is of scrambled kernel addresses, stable until reboot."""

    EQUAL = 0
    LESS = 1
    GREATER = 2
    DIFFERENT = 3
    """Not equal, and no order is to be had."""


class kcmp_epoll_slot(ctypes.Structure):  # noqa: N801
    """`struct kcmp_epoll_slot`: one target of an epoll instance."""

    _fields_ = (("efd", ctypes.c_uint32), ("tfd", ctypes.c_uint32), ("toff", ctypes.c_uint32))


def kcmp(
    pid1: Pid | Tid, pid2: Pid | Tid, kind: KcmpType, idx1: int = 0, idx2: int = 0
) -> Ordering:
    """Compare an object of two tasks (which may be the same task).

    Args:
        pid1: the first task.
        pid2: the second task.
        kind: what to compare; `FILE` is the open file description.
        idx1: for `FILE` and `EPOLL_TFD`, a descriptor number of the first task.
        idx2: for `FILE`, a descriptor number of the second; for `EPOLL_TFD` use
            `kcmp_epoll_target`.

    Raises:
        TargetGone: one of the tasks ended (named: the first).
        NotPermitted: ptrace access to one of them is refused.
        FeatureMissing: no CONFIG_KCMP.
        OSError: EBADF, a descriptor that is not open.
    """
    with failures_of(pid1, "compare the kernel objects"):
        return Ordering(syscall(NR.kcmp, pid1, pid2, kind, idx1, idx2))


def kcmp_epoll_target(pid1: Pid | Tid, fd: int, pid2: Pid | Tid, slot: kcmp_epoll_slot) -> Ordering:
    """Compare descriptor `fd` of the first task with a target of an epoll of the second.

    `slot` names the target as (epoll descriptor, target's number, `toff`-th target so numbered):
    epoll keeps watching a file whose number was closed and given to another.

    Kernel: KCMP_EPOLL_TFD, 4.13.

    Raises:
        TargetGone: one of the tasks ended (named: the first).
        NotPermitted: ptrace access to one of them is refused.
        FileNotFoundError: the epoll has no such target.
        OSError: EBADF, `fd` is not open.
    """
    return kcmp(pid1, pid2, KcmpType.EPOLL_TFD, fd, ctypes.addressof(slot))
