"""Scheduling of one thread: policy, nice, deadline, affinity, I/O priority; its robust list.

All of it can be read, and most of it set, from outside the thread.

Source: sched_setattr(2), sched_setaffinity(2), ioprio_set(2), get_robust_list(2),
include/uapi/linux/sched/types.h.
"""

import ctypes
import enum
import os
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Final

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.burst import Burst
from ckpt.kernel.failures import failures_of
from ckpt.kernel.libc import syscall, writable_address
from ckpt.units import Pid, RemoteAddr, Tid


class SchedPolicy(enum.IntEnum):
    """SCHED_*."""

    OTHER = 0
    FIFO = 1
    RR = 2
    BATCH = 3
    IDLE = 5
    DEADLINE = 6
    EXT = 7


class SchedFlag(enum.IntFlag):
    """SCHED_FLAG_*: the bits of `sched_attr.sched_flags`."""

    RESET_ON_FORK = 0x01
    RECLAIM = 0x02
    DL_OVERRUN = 0x04
    KEEP_POLICY = 0x08
    KEEP_PARAMS = 0x10
    UTIL_CLAMP_MIN = 0x20
    UTIL_CLAMP_MAX = 0x40


class sched_attr(ctypes.Structure):  # noqa: N801
    """`struct sched_attr` as of 5.3 (the first 48 bytes are those of 3.14)."""

    size: int
    sched_policy: int
    sched_flags: int
    sched_nice: int
    sched_priority: int
    sched_runtime: int
    sched_deadline: int
    sched_period: int
    sched_util_min: int
    sched_util_max: int
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("sched_policy", ctypes.c_uint32),
        ("sched_flags", ctypes.c_uint64),
        ("sched_nice", ctypes.c_int32),
        ("sched_priority", ctypes.c_uint32),
        ("sched_runtime", ctypes.c_uint64),
        ("sched_deadline", ctypes.c_uint64),
        ("sched_period", ctypes.c_uint64),
        ("sched_util_min", ctypes.c_uint32),
        ("sched_util_max", ctypes.c_uint32),
    )


def sched_getattr(tid: Tid | Pid) -> sched_attr:
    """Return policy and parameters of one thread; times in nanoseconds.

    Raises:
        TargetGone: there is no such thread.
    """
    attr = sched_attr()
    with failures_of(tid, "read the scheduling"):
        syscall(NR.sched_getattr, tid, ctypes.addressof(attr), ctypes.sizeof(sched_attr), 0)
    return attr


def sched_setattr(tid: Tid | Pid, attr: sched_attr) -> None:
    """Give a thread the policy and parameters that `sched_getattr` returned.

    Raises:
        TargetGone: there is no such thread.
        NotPermitted: a raise without CAP_SYS_NICE.
        OSError: EINVAL, a policy that this kernel does not know; EBUSY, no deadline bandwidth.
    """
    with failures_of(tid, "set the scheduling"):
        syscall(NR.sched_setattr, tid, ctypes.addressof(attr), 0)


def read_affinity(tid: Tid | Pid) -> frozenset[int]:
    """Return the numbers of the processors that the thread may run on.

    Raises:
        TargetGone: there is no such thread.
    """
    with failures_of(tid, "read the affinity"):
        return frozenset(os.sched_getaffinity(tid))


def set_affinity(tid: Tid | Pid, cpus: AbstractSet[int]) -> None:
    """Restrict the thread to `cpus`; those that this machine lacks are ignored by the kernel.

    Raises:
        TargetGone: there is no such thread.
        NotPermitted: another user's thread without CAP_SYS_NICE.
        OSError: EINVAL, none of `cpus` exists here.
    """
    with failures_of(tid, "set the affinity"):
        os.sched_setaffinity(tid, cpus)


IOPRIO_WHO_PROCESS: Final = 1
"""One thread, in spite of its name."""

IOPRIO_CLASS_SHIFT: Final = 13
"""The class (0 none, 1 real time, 2 best effort, 3 idle) stands above this bit."""


def ioprio_get(tid: Tid | Pid) -> int:
    """Return the thread's I/O priority, class and level in one word; 0 if none was set.

    Kernels from 6.5 on may answer best effort with the level of nice where none was set.

    Raises:
        TargetGone: there is no such thread.
    """
    with failures_of(tid, "read the I/O priority"):
        return syscall(NR.ioprio_get, IOPRIO_WHO_PROCESS, tid)


def ioprio_set(tid: Tid | Pid, ioprio: int) -> None:
    """Set the thread's I/O priority to what `ioprio_get` returned.

    Raises:
        TargetGone: there is no such thread.
        NotPermitted: the real-time class without CAP_SYS_ADMIN or CAP_SYS_NICE.
        OSError: EINVAL, no such class or level.
    """
    with failures_of(tid, "set the I/O priority"):
        syscall(NR.ioprio_set, IOPRIO_WHO_PROCESS, tid, ioprio)


ROBUST_LIST_HEAD_BYTES: Final = 24
"""sizeof(struct robust_list_head) (include/uapi/linux/futex.h), the only length there is."""


def get_robust_list(tid: Tid | Pid) -> tuple[RemoteAddr, int]:
    """Return (address of the head, its length in bytes); the address is 0 if none was set.

    Raises:
        TargetGone: there is no such thread.
        NotPermitted: ptrace access to it is refused.
    """
    head = ctypes.c_uint64()
    length = ctypes.c_uint64()
    with failures_of(tid, "read the robust futex list"):
        syscall(NR.get_robust_list, tid, ctypes.addressof(head), ctypes.addressof(length))
    return RemoteAddr(head.value), length.value


class RobustListBurst:
    """`get_robust_list` of many threads, laid out beforehand."""

    def __init__(self, tids: Iterable[Tid]) -> None:
        """Lay out the calls."""
        self._tids = list(tids)
        self._words = bytearray(_HEAD_AND_LENGTH_BYTES * len(self._tids))
        address, _ = writable_address(self._words)
        self._calls = Burst()
        for index, tid in enumerate(self._tids):
            at = address + _HEAD_AND_LENGTH_BYTES * index
            self._calls.add(NR.get_robust_list, tid, at, at + 8)

    def run(self) -> dict[Tid, RemoteAddr]:
        """Return the address of each thread's list, 0 if it has none; without those that fail."""
        results = self._calls.run()
        heads = memoryview(self._words).cast("Q")[::2].tolist()
        return {
            tid: RemoteAddr(head)
            for tid, result, head in zip(self._tids, results, heads, strict=True)
            if result == 0
        }


_HEAD_AND_LENGTH_BYTES = 16


@attrs.frozen(slots=True, eq=False, repr=False)
class Scheduled:
    """What the kernel tells of one thread's scheduling, as it tells it."""

    attr_raw: bytes
    """`struct sched_attr`"""
    affinity_raw: bytes
    """Bit n of byte m is processor 8 * m + n."""
    ioprio: int

    @property
    def policy(self) -> int:
        """SCHED_*."""
        return int.from_bytes(self.attr_raw[4:8], "little")

    @property
    def attr(self) -> sched_attr:
        """Policy and parameters."""
        attr: sched_attr = sched_attr.from_buffer_copy(self.attr_raw)
        return attr

    @property
    def processors(self) -> frozenset[int]:
        """The numbers of the processors that the thread may run on."""
        mask = int.from_bytes(self.affinity_raw, "little")
        return frozenset(number for number in range(mask.bit_length()) if mask >> number & 1)


class SchedulingBurst:
    """`sched_getattr`, `read_affinity` and `ioprio_get` of many threads, laid out beforehand."""

    def __init__(self, tids: Iterable[Tid]) -> None:
        """Lay out the calls."""
        self._tids = list(tids)
        self._memory = bytearray(_SCHEDULED_BYTES * len(self._tids))
        address, _ = writable_address(self._memory)
        self._calls = Burst()
        for index, tid in enumerate(self._tids):
            at = address + _SCHEDULED_BYTES * index
            self._calls.add(NR.sched_getattr, tid, at, _ATTR_BYTES, 0)
            self._calls.add(NR.sched_getaffinity, tid, _AFFINITY_BYTES, at + _ATTR_BYTES)
            self._calls.add(NR.ioprio_get, IOPRIO_WHO_PROCESS, tid)

    def run(self) -> dict[Tid, Scheduled]:
        """Return how each thread is scheduled; without those of which a call fails."""
        results = self._calls.run()
        raw = bytes(self._memory)
        answers: dict[Tid, Scheduled] = {}
        for index, tid in enumerate(self._tids):
            attr, mask_bytes, ioprio = results[3 * index : 3 * index + 3]
            if attr == 0 <= mask_bytes and ioprio >= 0:
                at = _SCHEDULED_BYTES * index
                affinity_at = at + _ATTR_BYTES
                answers[tid] = Scheduled(
                    raw[at:affinity_at], raw[affinity_at : affinity_at + mask_bytes], ioprio
                )
        return answers


_ATTR_BYTES: Final = ctypes.sizeof(sched_attr)
_AFFINITY_BYTES: Final = 128
"""A kernel for more than 1024 processors refuses to tell less than all of them."""
_SCHEDULED_BYTES: Final = _ATTR_BYTES + _AFFINITY_BYTES
