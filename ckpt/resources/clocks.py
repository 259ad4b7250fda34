"""CLOCK_MONOTONIC and CLOCK_BOOTTIME, which must not jump for a process that was away.

The process is restored in a time namespace of its own, in which both go on from where they stood
when it was captured: timeouts, deadlines and intervals that it remembers stay right. Its processor
time clocks start at zero again; CLOCK_REALTIME is the host's.

Kernel: clock_gettime(2) as a raw call inside the process, so it tells what the process itself sees,
whatever its time namespace; time_namespaces(7) (Linux 5.6). The namespace is made when the seed is
planted (`process/seed.py`), from `offsets_for`. A host without time namespaces is refused before
anything starts.
"""

import os
import struct
import time
from collections.abc import Iterator

import attrs

from ckpt.errors import Finding
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features
from ckpt.kernel.procfs import task as procfs_task
from ckpt.process.remote import Out, call
from ckpt.process.seed import ClockOffsets
from ckpt.resources.base import Capture, Later, Rebuilt, Resource, Restore, Stage, Stopped
from ckpt.units import Pid

_NS_PER_S = 1_000_000_000
_TIMESPEC = struct.Struct("<qq")


@attrs.frozen(slots=True, repr=False)
class ClocksRecord:
    """What the clocks of a process showed."""

    monotonic_ns: int
    boottime_ns: int


def capture(stopped: Stopped) -> Capture[ClocksRecord]:
    """Ask the process for the time that it sees."""
    del stopped
    replies = yield _ASK_CLOCKS
    return Later(lambda: ClocksRecord(*(_nanoseconds(reply.outs[0]) for reply in replies)))


_ASK_CLOCKS = [
    call(NR.clock_gettime, clock, Out(_TIMESPEC.size))
    for clock in (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)
]


def _nanoseconds(raw: bytes) -> int:
    seconds, nanoseconds = _TIMESPEC.unpack(raw)
    return int(seconds * _NS_PER_S + nanoseconds)


def offsets_for(record: ClocksRecord) -> ClockOffsets:
    """Return what a new time namespace must add to the host's clocks from now on."""
    # Offsets are always against the host's own clocks, and we may be in a namespace ourselves. (The
    # file tells of the namespace of our children: ours, since we never call unshare.)
    own = procfs_task.read_timens_offsets(Pid(os.getpid()))
    host_monotonic_ns = time.monotonic_ns() - own.monotonic_ns
    host_boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - own.boottime_ns
    return ClockOffsets(
        monotonic_ns=record.monotonic_ns - host_monotonic_ns,
        boottime_ns=record.boottime_ns - host_boottime_ns,
    )


def check_host(_record: ClocksRecord, features: Features) -> Iterator[Finding]:
    """Refuse a host on which the clocks would jump."""
    if not features.timens or not {"sys_admin"} & features.capabilities:
        yield Finding(
            "clocks",
            "this host gives us no time namespace, so CLOCK_MONOTONIC would jump",
            "use a kernel with CONFIG_TIME_NS, as root",
        )


def restore(_record: ClocksRecord, _rebuilt: Rebuilt) -> Restore:
    """Do nothing: the process was planted in its namespace."""
    yield []


CLOCKS = Resource(
    "clocks",
    ClocksRecord,
    Stage.PROCESS,
    capture=capture,
    restore=restore,
    check_host=check_host,
)
