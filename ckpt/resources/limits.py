"""Resource limits, the adjustment for the out-of-memory killer, and what a core dump would hold.

Kernel: /proc/PID/limits, read from outside (prlimit(2) on another user's process needs
CAP_SYS_RESOURCE); prlimit64 inside the restored process; /proc/PID/oom_score_adj and
/proc/PID/coredump_filter from outside.

Without CAP_SYS_RESOURCE a hard limit cannot be raised: an image with a higher one than the restorer
has is refused before anything starts. The oom adjustment cannot be lowered then: the user is told,
and it stays the restorer's. Equal values are not touched, so an ordinary user's restore works.
Processor time starts at zero again, so RLIMIT_CPU counts from there.
"""

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import attrs

from ckpt.errors import CkptError, Finding, NotPermitted
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features
from ckpt.kernel.procfs import files as procfs_files
from ckpt.kernel.procfs import task as procfs_task
from ckpt.process.remote import Call, In, call
from ckpt.resources.base import Capture, Later, Rebuilt, Resource, Restore, Stage, Stopped, expect
from ckpt.units import Pid

_RLIMIT = struct.Struct("<QQ")
_NAMES = (
    *("CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS"),
    *("LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME"),
)


@attrs.frozen(slots=True, repr=False)
class LimitRecord:
    """One RLIMIT_*; 2**64 - 1 for none."""

    resource: int
    soft: int
    hard: int


@attrs.frozen(slots=True, repr=False)
class LimitsRecord:
    """The limits of a process."""

    limits: tuple[LimitRecord, ...]
    oom_score_adj: int
    coredump_filter: int
    """Bits of core(5); -1 where this kernel writes no core dumps."""


def capture(stopped: Stopped) -> Capture[LimitsRecord]:
    """Read all of it from outside."""
    limits, adjustment, dump_filter = _READS
    raw = (
        stopped.read_file(limits),
        stopped.read_file(adjustment),
        _or_nothing(lambda: stopped.read_file(dump_filter)),
    )
    yield []
    return Later(lambda: _record_of(*raw))


_READS = ("limits", "oom_score_adj", "coredump_filter")


def _or_nothing(read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except CkptError:
        return b""


def read_limits(pid: Pid) -> LimitsRecord:
    """Return what /proc tells of a process.

    Raises:
        TargetGone: it ended.
    """
    limits, adjustment, dump_filter = _READS
    return _record_of(
        procfs_files.read_bytes(pid, limits),
        procfs_files.read_bytes(pid, adjustment),
        _or_nothing(lambda: procfs_files.read_bytes(pid, dump_filter)),
    )


def _record_of(limits: bytes, adjustment: bytes, dump_filter: bytes) -> LimitsRecord:
    parsed = sorted(procfs_task.parse_limits(procfs_files.decode(limits)).items())
    return LimitsRecord(
        tuple(LimitRecord(number, limit.soft, limit.hard) for number, limit in parsed),
        int(adjustment),
        int(dump_filter, 16) if dump_filter else -1,
    )


def check_host(record: LimitsRecord, features: Features) -> Iterator[Finding]:
    """Name the hard limits that are above ours, where only CAP_SYS_RESOURCE could raise them."""
    if "sys_resource" in features.capabilities:
        return
    ours = {limit.resource: limit.hard for limit in read_limits(Pid(os.getpid())).limits}
    for limit in record.limits:
        if limit.hard > ours.get(limit.resource, limit.hard):
            yield Finding(
                f"limit RLIMIT_{_NAMES[limit.resource]}",
                f"its hard value was {limit.hard}, here it is {ours[limit.resource]}, and raising"
                " it needs CAP_SYS_RESOURCE",
                "raise the limit of the shell that runs ckpt",
            )


def restore(record: LimitsRecord, rebuilt: Rebuilt) -> Restore:
    """Set what differs."""
    now = read_limits(rebuilt.pid)
    expect("setting limits", (yield list(_iter_changes(record.limits, now.limits))))
    if record.oom_score_adj != now.oom_score_adj:
        try:
            procfs_task.write_oom_score_adj(rebuilt.pid, record.oom_score_adj)
        except NotPermitted:
            rebuilt.warn(
                f"oom_score_adj stays {now.oom_score_adj}, it was {record.oom_score_adj}:"
                " lowering it needs CAP_SYS_RESOURCE"
            )
    if record.coredump_filter not in (-1, now.coredump_filter) and now.coredump_filter != -1:
        path = Path(f"/proc/{rebuilt.pid}/coredump_filter")
        path.write_text(hex(record.coredump_filter), encoding="ascii")


def _iter_changes(wanted: Iterable[LimitRecord], now: Iterable[LimitRecord]) -> Iterator[Call]:
    same = set(now)
    for limit in wanted:
        if limit not in same:
            raw = _RLIMIT.pack(limit.soft, limit.hard)
            yield call(NR.prlimit64, 0, limit.resource, In(raw), 0)


LIMITS = Resource(
    "limits",
    LimitsRecord,
    Stage.LATE,
    capture=capture,
    restore=restore,
    reads=_READS,
    check_host=check_host,
)
