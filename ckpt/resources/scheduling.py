"""How a thread is scheduled: policy, nice, priority, processors, I/O priority, timer slack.

Kernel: sched_getattr(2), sched_setattr(2), sched_setaffinity(2), ioprio_get(2), ioprio_set(2),
setpriority(2), all from outside; prctl(2) PR_GET_TIMERSLACK and PR_SET_TIMERSLACK inside.

What is already as it should be is not touched, so no privilege is needed for it; the rest may need
CAP_SYS_NICE (`NotPermitted`). A thread that was allowed every processor is allowed every processor
here; if none of the recorded ones exists here, the thread stays on those of the restorer and the
user is told. A deadline for which this host has no bandwidth left, or a policy that it does not
know, is `RestoreFailed`. Control groups and core-scheduling cookies are not captured.
"""

import ctypes
import os
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from functools import lru_cache

import attrs

from ckpt.errors import Finding, RestoreFailed
from ckpt.kernel import sched
from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import Prctl
from ckpt.kernel.procfs import stat as procfs_stat
from ckpt.kernel.procfs.files import list_tids
from ckpt.process.remote import call
from ckpt.resources.at_once import AskedAtOnce
from ckpt.resources.base import (
    Capture,
    Later,
    Rebuilt,
    Resource,
    Restore,
    Stage,
    Stopped,
    Target,
    expect,
)
from ckpt.units import Pid, Tid

_KEPT_FLAGS = sched.SchedFlag.RESET_ON_FORK | sched.SchedFlag.RECLAIM | sched.SchedFlag.DL_OVERRUN
_CLAMPS = sched.SchedFlag.UTIL_CLAMP_MIN | sched.SchedFlag.UTIL_CLAMP_MAX


@attrs.frozen(slots=True, repr=False)
class SchedulingRecord:
    """How the kernel shares its processors and disks with one thread."""

    policy: int
    """SCHED_*."""
    flags: int
    """SCHED_FLAG_* of `_KEPT_FLAGS`."""
    nice: int
    rt_priority: int
    runtime_ns: int
    """Of SCHED_DEADLINE; of an ordinary policy the length of its slices (Linux 6.12)."""
    deadline_ns: int
    """This and the next: of SCHED_DEADLINE."""
    period_ns: int
    util_min: int
    """0 to 1024; both are 0 where the kernel has no utilisation clamps."""
    util_max: int
    processors: tuple[int, ...]
    """Empty: all."""
    ioprio: int
    """Class and level (ioprio_set(2))."""
    timer_slack_ns: int
    """0 for a real-time thread."""


def look(target: Target) -> Iterable[Finding]:
    """Lay out what is asked from outside, of all threads at once; there is nothing to refuse."""
    target.notes[_ASKED] = AskedAtOnce(sched.SchedulingBurst(list_tids(target.pid)).run)
    return ()


_ASKED = "scheduling of threads"


def capture(stopped: Stopped) -> Capture[SchedulingRecord]:
    """Read the rest from outside, ask inside for the timer slack."""
    read = _read_from_outside(stopped)
    replies = yield _ASK_SLACK
    return Later(lambda: attrs.evolve(read().record, timer_slack_ns=max(replies[0].value, 0)))


def _read_from_outside(stopped: Stopped) -> Callable[[], "_Raw"]:
    """Read everything but the timer slack; return what makes something of it."""
    asked: AskedAtOnce[sched.Scheduled] | None = stopped.notes.get(_ASKED)
    told = asked.of(stopped) if asked else None
    if told is None or told.policy in _NICE_HIDDEN:
        raw = _read_raw(stopped.pid, stopped.tid)
        return lambda: raw
    return lambda: _raw_of(told)


_ASK_SLACK = [call(NR.prctl, Prctl.GET_TIMERSLACK)]
_NICE_HIDDEN = (sched.SchedPolicy.FIFO, sched.SchedPolicy.RR, sched.SchedPolicy.DEADLINE)


@attrs.frozen(slots=True, eq=False, repr=False)
class _Raw:
    """What the kernel has told."""

    attr: sched.sched_attr
    processors: AbstractSet[int]
    ioprio: int
    nice: int

    @property
    def record(self) -> SchedulingRecord:
        """Everything but the timer slack."""
        attr, processors = self.attr, self.processors
        return SchedulingRecord(
            policy=attr.sched_policy,
            flags=attr.sched_flags & _KEPT_FLAGS,
            nice=self.nice,
            rt_priority=attr.sched_priority,
            runtime_ns=attr.sched_runtime,
            deadline_ns=attr.sched_deadline,
            period_ns=attr.sched_period,
            util_min=attr.sched_util_min,
            util_max=attr.sched_util_max,
            processors=() if processors >= _all_processors() else tuple(sorted(processors)),
            ioprio=self.ioprio,
            timer_slack_ns=0,
        )


def _raw_of(told: sched.Scheduled) -> _Raw:
    attr = told.attr
    return _Raw(attr, told.processors, told.ioprio, attr.sched_nice)


def _read_raw(pid: Pid, tid: Tid) -> _Raw:
    attr = sched.sched_getattr(tid)
    nice = attr.sched_nice
    if attr.sched_policy in _NICE_HIDDEN:
        nice = procfs_stat.read_task_stat(pid, tid).nice
    return _Raw(attr, sched.read_affinity(tid), sched.ioprio_get(tid), nice)


def _read(pid: Pid, tid: Tid) -> SchedulingRecord:
    """Return everything but the timer slack."""
    return _read_raw(pid, tid).record


@lru_cache(maxsize=1)
def _all_processors() -> frozenset[int]:
    """Return the processors that are in use on this host."""
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        return parse_cpu_list(file.read())


def parse_cpu_list(text: str) -> frozenset[int]:
    """Parse the kernel's way to write a set of processors: `0-3,7`."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def restore(record: SchedulingRecord, rebuilt: Rebuilt) -> Restore:
    """Set what differs; the policy last, since it decides what else may be set."""
    if record.timer_slack_ns:
        replies = yield [call(NR.prctl, Prctl.SET_TIMERSLACK, record.timer_slack_ns)]
        expect("setting the timer slack", replies)
    try:
        _restore_outside(record, rebuilt)
    except OSError as error:
        step = f"the scheduling of thread {rebuilt.task.tid}"
        raise RestoreFailed(step, error.strerror or str(error)) from error


def _restore_outside(record: SchedulingRecord, rebuilt: Rebuilt) -> None:
    tid = rebuilt.task.tid
    now = _read(rebuilt.pid, tid)
    if record.processors != now.processors:
        _set_processors(record.processors, rebuilt)
    if record.nice != now.nice:
        os.setpriority(os.PRIO_PROCESS, tid, record.nice)
        now = _read(rebuilt.pid, tid)
    wanted = attrs.evolve(now, processors=record.processors, ioprio=record.ioprio)
    if record != attrs.evolve(wanted, timer_slack_ns=record.timer_slack_ns):
        sched.sched_setattr(tid, _attr_of(record, now))
    if record.ioprio != sched.ioprio_get(tid):
        sched.ioprio_set(tid, record.ioprio)


def _set_processors(processors: tuple[int, ...], rebuilt: Rebuilt) -> None:
    here = _all_processors()
    possible = here.intersection(processors) if processors else here
    if possible:
        sched.set_affinity(rebuilt.task.tid, possible)
    if not possible or possible < set(processors):
        rebuilt.warn(
            f"thread {rebuilt.task.tid} was bound to processors {list(processors)},"
            f" of which this host has {sorted(possible) or 'none'}"
        )


def _attr_of(record: SchedulingRecord, now: SchedulingRecord) -> sched.sched_attr:
    clamped = (record.util_min, record.util_max) != (now.util_min, now.util_max)
    has_clamps = bool(record.util_max and now.util_max)
    # A slice that is set stays set, even if it equals the default: 0 leaves it alone.
    runtime_ns = record.runtime_ns
    if record.policy != sched.SchedPolicy.DEADLINE and runtime_ns == now.runtime_ns:
        runtime_ns = 0
    return sched.sched_attr(
        size=ctypes.sizeof(sched.sched_attr),
        sched_policy=record.policy,
        sched_flags=record.flags | (_CLAMPS if clamped and has_clamps else 0),
        sched_nice=record.nice,
        sched_priority=record.rt_priority,
        sched_runtime=runtime_ns,
        sched_deadline=record.deadline_ns,
        sched_period=record.period_ns,
        sched_util_min=record.util_min,
        sched_util_max=record.util_max,
    )


SCHEDULING = Resource(
    "scheduling", SchedulingRecord, Stage.LATE, capture=capture, restore=restore, look=look
)
