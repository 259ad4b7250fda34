"""Timers of a process: the three interval timers, and those of timer_create(2).

Kernel: getitimer(2), setitimer(2); /proc/PID/timers (CONFIG_CHECKPOINT_RESTORE) for id, clock and
notification, timer_gettime(2) inside the process for the time that is left; timer_create(2),
timer_settime(2). Ids come back as they were, gaps included: with prctl(2)
PR_TIMER_CREATE_RESTORE_IDS (Linux 6.15), else by making and deleting timers until the kernel's
count, which starts at 0 in a new process, arrives there (about 10 s for a million).

Every timer is armed with the time that was left, last of all, minus what has passed since on the
process's own clock. Not exactly as it was:

- A timer that was set to an absolute time of CLOCK_REALTIME goes by the time that was left.
- Overruns that were counted but not delivered are lost.
- The kernel does not tell whose clock a timer of CLOCK_THREAD_CPUTIME_ID counts: it is taken for
  the clock of the thread that is notified, or else of the first thread.
- A timer whose thread to be notified had ended comes back silent, as it was.
- Processor time starts at zero again; its timers go by the time that was left.
- A CPU-time clock of another process fails the restore if that process is not there.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence

import attrs

from ckpt.errors import RestoreFailed
from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import (
    PR_TIMER_CREATE_RESTORE_IDS_OFF,
    PR_TIMER_CREATE_RESTORE_IDS_ON,
    Prctl,
)
from ckpt.kernel.procfs import task as procfs_task
from ckpt.kernel.procfs.files import decode
from ckpt.process.pid_space import Numbers
from ckpt.process.remote import Call, In, InOut, Out, Reply, call
from ckpt.resources.base import Capture, Later, Rebuilt, Resource, Restore, Stage, Stopped, expect
from ckpt.units import iter_batches

_ITIMER_REAL = 0
_ITIMERS = (_ITIMER_REAL, 1, 2)
"""And ITIMER_VIRTUAL, ITIMER_PROF."""
_INTERVAL_AND_VALUE = struct.Struct("<4q")
"""`struct itimerval` (seconds, microseconds) and `struct itimerspec` (seconds, nanoseconds)."""
_TIMESPEC = struct.Struct("<qq")
_SIGEVENT = struct.Struct("<Qiii")
_SIGEVENT_BYTES = 64
_TIMER_ID_BYTES = 4
_NS_PER_S, _NS_PER_US = 1_000_000_000, 1000

SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4
_NOTIFY = {"signal": SIGEV_SIGNAL, "none": SIGEV_NONE, "thread": SIGEV_THREAD}

_CLOCK_MONOTONIC = 1
_CPU_CLOCKS = (2, 3)
"""CLOCK_PROCESS_CPUTIME_ID, CLOCK_THREAD_CPUTIME_ID; /proc writes them as negative numbers."""
_THREAD_CPU_CLOCK = -2
"""CLOCK_THREAD_CPUTIME_ID as /proc writes it: of thread 0, which is whoever asks."""
_CPUCLOCK_THREAD_SCHED = 0b110
_CREATED_AT_ONCE = 500


@attrs.frozen(slots=True, repr=False)
class IntervalTimerRecord:
    """What is left of one interval timer."""

    which: int
    """ITIMER_*."""
    interval_ns: int
    left_ns: int


@attrs.frozen(slots=True, repr=False)
class PosixTimerRecord:
    """One timer of timer_create(2)."""

    id: int
    clock: int
    notify: int
    """SIGEV_*; with SIGEV_THREAD_ID, `thread` is who gets the signal."""
    signal: int
    value: int
    """The pointer-sized word that the signal brings."""
    thread: int
    """0: the whole process."""
    interval_ns: int
    left_ns: int
    """0: not armed."""


@attrs.frozen(slots=True, repr=False)
class TimersRecord:
    """All timers of a process."""

    interval_timers: tuple[IntervalTimerRecord, ...]
    """Those that are armed."""
    posix_timers: tuple[PosixTimerRecord, ...]
    """Ascending by id."""
    monotonic_ns: int
    """CLOCK_MONOTONIC of the process when it was asked for the rest."""


def capture(stopped: Stopped) -> Capture[TimersRecord]:
    """List the timers from outside, ask inside for the time that is left."""
    listed = sorted(
        procfs_task.parse_timers(decode(stopped.read_file(_LIST))), key=lambda timer: timer.timer_id
    )
    replies = yield [
        *_ASK_ALWAYS,
        *(call(NR.timer_gettime, t.timer_id, Out(_INTERVAL_AND_VALUE.size)) for t in listed),
    ]
    return Later(lambda: _timers_of(listed, replies))


def renumber(record: TimersRecord, numbers: Numbers) -> TimersRecord:
    """See `Resource.renumber`: /proc tells threads as we see them."""
    return attrs.evolve(
        record,
        posix_timers=tuple(
            attrs.evolve(timer, thread=numbers.of(timer.thread)) for timer in record.posix_timers
        ),
    )


_LIST = "timers"


def _timers_of(listed: Sequence[procfs_task.PosixTimer], answers: Sequence[Reply]) -> TimersRecord:
    now, *replies = answers
    n_interval = len(_ITIMERS)
    return TimersRecord(
        tuple(_iter_interval_timers(replies[:n_interval])),
        tuple(map(_record_of, listed, replies[n_interval:])),
        _nanoseconds(now),
    )


def _ask_clock() -> Call:
    return call(NR.clock_gettime, _CLOCK_MONOTONIC, Out(_TIMESPEC.size))


_ASK_ALWAYS = [
    _ask_clock(),
    *(call(NR.getitimer, which, Out(_INTERVAL_AND_VALUE.size)) for which in _ITIMERS),
]


def _nanoseconds(reply: Reply) -> int:
    seconds, nanoseconds = _TIMESPEC.unpack(reply.outs[0])
    return int(seconds * _NS_PER_S + nanoseconds)


def _iter_interval_timers(replies: Iterable[Reply]) -> Iterator[IntervalTimerRecord]:
    for which, reply in zip(_ITIMERS, replies, strict=True):
        interval_ns, left_ns = _unpack(reply.outs[0], _NS_PER_US)
        if left_ns:
            yield IntervalTimerRecord(which, interval_ns, left_ns)


def _unpack(raw: bytes, unit_ns: int) -> tuple[int, int]:
    """Return (interval, time left) in nanoseconds."""
    interval_s, interval_units, left_s, left_units = _INTERVAL_AND_VALUE.unpack(raw)
    return (
        int(interval_s * _NS_PER_S + interval_units * unit_ns),
        int(left_s * _NS_PER_S + left_units * unit_ns),
    )


def _pack(interval_ns: int, left_ns: int, unit_ns: int) -> In:
    return In(
        _INTERVAL_AND_VALUE.pack(
            interval_ns // _NS_PER_S,
            interval_ns % _NS_PER_S // unit_ns,
            left_ns // _NS_PER_S,
            left_ns % _NS_PER_S // unit_ns,
        )
    )


def _record_of(timer: procfs_task.PosixTimer, reply: Reply) -> PosixTimerRecord:
    interval_ns, left_ns = _unpack(reply.outs[0], 1)
    notify = _NOTIFY[timer.notify] | (SIGEV_THREAD_ID if timer.to_thread else 0)
    return PosixTimerRecord(
        id=timer.timer_id,
        clock=timer.clock_id,
        notify=notify,
        signal=timer.signo,
        value=timer.sigev_value,
        thread=timer.target if timer.to_thread else 0,
        interval_ns=interval_ns,
        left_ns=left_ns,
    )


def restore(record: TimersRecord, rebuilt: Rebuilt) -> Restore:
    """Make every timer with its id, then arm them all in one batch."""
    if record.posix_timers:
        if rebuilt.features.timer_restore_ids:
            yield from _create_with_ids(record.posix_timers)
        else:
            yield from _create_counting(record.posix_timers)
    (now,) = yield [_ask_clock()]
    passed_ns = max(0, _nanoseconds(now) - record.monotonic_ns)
    expect("arming timers", (yield list(_iter_arming(record, passed_ns))))


def _create_with_ids(timers: tuple[PosixTimerRecord, ...]) -> Restore:
    # Left on, the process's own timer_create would read an id from uninitialised memory.
    replies = yield [
        _restore_ids(PR_TIMER_CREATE_RESTORE_IDS_ON),
        *(_create(timer, timer.id) for timer in timers),
        _restore_ids(PR_TIMER_CREATE_RESTORE_IDS_OFF),
    ]
    expect("making timers", replies)
    for timer, reply in zip(timers, replies[1:-1], strict=True):
        _judge_id(timer.id, reply)


def _restore_ids(switch: int) -> Call:
    return call(NR.prctl, Prctl.TIMER_CREATE_RESTORE_IDS, switch, 0, 0, 0)


def _create_counting(timers: tuple[PosixTimerRecord, ...]) -> Restore:
    for batch in iter_batches(plan_creation(timers), _CREATED_AT_ONCE):
        replies = yield [asked for step in batch for asked in step.calls()]
        expect("making timers", replies)
        created = [reply for reply in replies if reply.asked.nr is NR.timer_create]
        for step, reply in zip(batch, created, strict=True):
            _judge_id(step.timer.id, reply)


@attrs.frozen(slots=True, repr=False)
class Creation:
    """One timer to be made, where the kernel counts the ids up from 0."""

    timer: PosixTimerRecord
    keep: bool
    """False: it only makes the count go on."""

    def calls(self) -> Iterator[Call]:
        """Yield what makes it, and what removes it again."""
        yield _create(self.timer, 0)
        if not self.keep:
            yield call(NR.timer_delete, self.timer.id)


def plan_creation(timers: Iterable[PosixTimerRecord]) -> Iterator[Creation]:
    """Yield what to make, id after id from 0 on; `timers` ascend by id."""
    next_id = 0
    for timer in timers:
        for gap in range(next_id, timer.id):
            yield Creation(attrs.evolve(_FILLER, id=gap), keep=False)
        yield Creation(timer, keep=True)
        next_id = timer.id + 1


_FILLER = PosixTimerRecord(
    id=0,
    clock=_CLOCK_MONOTONIC,
    notify=SIGEV_NONE,
    signal=0,
    value=0,
    thread=0,
    interval_ns=0,
    left_ns=0,
)


def _create(timer: PosixTimerRecord, timer_id: int) -> Call:
    """Return the call; `timer_id` is what the kernel is asked for, where it may be asked."""
    notify = timer.notify
    if notify & SIGEV_THREAD_ID and not timer.thread:
        notify = SIGEV_NONE
    event = _SIGEVENT.pack(timer.value, timer.signal, notify, timer.thread)
    return call(
        NR.timer_create,
        clock_of(timer),
        In(event.ljust(_SIGEVENT_BYTES, b"\0")),
        InOut(timer_id.to_bytes(_TIMER_ID_BYTES, "little")),
    )


def clock_of(timer: PosixTimerRecord) -> int:
    """Return the clock by which to make the timer from the first thread."""
    if timer.clock == _THREAD_CPU_CLOCK and timer.thread:
        return ~timer.thread << 3 | _CPUCLOCK_THREAD_SCHED
    return timer.clock


def _judge_id(wanted: int, reply: Reply) -> None:
    got = int.from_bytes(reply.outs[0], "little")
    if got != wanted:
        raise RestoreFailed("making timers", f"a timer got id {got}, not {wanted}")


def _iter_arming(record: TimersRecord, passed_ns: int) -> Iterator[Call]:
    for timer in record.posix_timers:
        if timer.left_ns:
            passed = 0 if _counts_processor_time(timer.clock) else passed_ns
            when = _pack(timer.interval_ns, max(1, timer.left_ns - passed), 1)
            yield call(NR.timer_settime, timer.id, 0, when, 0)
    for itimer in record.interval_timers:
        passed = passed_ns if itimer.which == _ITIMER_REAL else 0
        left_ns = max(_NS_PER_US, itimer.left_ns - passed)
        yield call(NR.setitimer, itimer.which, _pack(itimer.interval_ns, left_ns, _NS_PER_US), 0)


def _counts_processor_time(clock: int) -> bool:
    return clock < 0 or clock in _CPU_CLOCKS


TIMERS = Resource(
    "timers",
    TimersRecord,
    Stage.LATE,
    capture=capture,
    restore=restore,
    reads=(_LIST,),
    renumber=renumber,
)
