"""The clocks of a tree that moves: they go on, and never back.

The destination asks, and adds to the answer all of the time that it took: so its clocks are ahead
of the source's by at most the way of one message.

Kernel: time_namespaces(7), /proc/PID/timens_offsets.
"""

import os
import time

from ckpt.kernel.procfs.task import read_timens_offsets
from ckpt.migrate.channel import Channel
from ckpt.migrate.messages import Clocks
from ckpt.process.seed import ClockOffsets
from ckpt.units import Pid


def _read_host() -> tuple[int, int]:
    """Return the host's own CLOCK_MONOTONIC and CLOCK_BOOTTIME, in nanoseconds."""
    own = read_timens_offsets(Pid(os.getpid()))
    monotonic_ns, boottime_ns = time.monotonic_ns(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return monotonic_ns - own.monotonic_ns, boottime_ns - own.boottime_ns


def answer_clocks(channel: Channel, root: Pid) -> None:
    """Say what the clocks of a tree show now."""
    channel.receive(Clocks)
    theirs = read_timens_offsets(root)
    monotonic_ns, boottime_ns = _read_host()
    channel.send(Clocks(monotonic_ns + theirs.monotonic_ns, boottime_ns + theirs.boottime_ns))


def ask_clocks(channel: Channel) -> ClockOffsets:
    """Return what a time namespace here must add for the clocks to go on."""
    asked_ns = time.monotonic_ns()
    channel.send(Clocks())
    there = channel.receive(Clocks)
    monotonic_ns, boottime_ns = _read_host()
    way_ns = time.monotonic_ns() - asked_ns
    return ClockOffsets(
        monotonic_ns=there.monotonic_ns + way_ns - monotonic_ns,
        boottime_ns=there.boottime_ns + way_ns - boottime_ns,
    )
