"""Timers that are read: timerfd.

    it was armed for 10.0 s, every 3 s        captured at 8.5: expires at 10.0, no ticks
    the process is back at 14.2               10.0 and 13.0 were missed: 2 ticks, next at 16.0

The record holds when a timer expires by the clock that it goes by, as the process sees that: it
runs on in the process's time namespace (`clocks`). What has expired until the process is back is
counted, as the kernel counts for a process that was not scheduled; so a timer keeps its beat, and
it does not matter that it is armed before other things are restored: it wakes nobody then.

    clock                       set to an absolute time        set to a time from now
    MONOTONIC, BOOTTIME         itself                         itself
    REALTIME                    itself: the host's             MONOTONIC (so does the kernel)
    REALTIME_ALARM              REALTIME                       MONOTONIC
    BOOTTIME_ALARM              BOOTTIME                       BOOTTIME

Kernel: timerfd_create(2), timerfd_settime(2), TFD_IOC_SET_TICKS (include/uapi/linux/timerfd.h,
Linux 3.17, CONFIG_CHECKPOINT_RESTORE) for what has expired and was not read. An interval timer
that has expired counts on only when it is asked: timerfd_gettime(2) comes first, then fdinfo.

Not exactly as it was: with TFD_TIMER_CANCEL_ON_SET, a change of the clock that the process has not
read of yet (ECANCELED) comes back as one more expiration, and that the clock went on without the
process is no change. A timer of less than 100 us may be off by one.
"""

import os
import struct
import time
from collections.abc import Iterator
from itertools import pairwise

import attrs

from ckpt.errors import TargetGone
from ckpt.kernel.arch import NR
from ckpt.kernel.ioctl import iow
from ckpt.kernel.libc import syscall
from ckpt.kernel.procfs.fdinfo import TimerFd, read_fdinfo
from ckpt.process.remote import Call, In, Out, Reply, call
from ckpt.resources.base import Opening, Restore, expect
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Attaching, Kind, set_status_flags
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.units import Fd, RemoteFd

TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET = 1, 2
TFD_IOC_SET_TICKS = iow("T", 0, 8)
_CLOSE_ON_EXEC = 0o2000000
_REALTIME_ALARM, _BOOTTIME_ALARM = 8, 9
_CLOCKS = {
    time.CLOCK_REALTIME: time.CLOCK_REALTIME,
    time.CLOCK_MONOTONIC: time.CLOCK_MONOTONIC,
    time.CLOCK_BOOTTIME: time.CLOCK_BOOTTIME,
    _REALTIME_ALARM: time.CLOCK_REALTIME,
    _BOOTTIME_ALARM: time.CLOCK_BOOTTIME,
}
"""Clock of a timerfd -> the one by which it expires if the time was absolute."""
_TIMESPEC = struct.Struct("<qq")
_INTERVAL_AND_VALUE = struct.Struct("<4q")
"""`struct itimerspec`."""
_NS_PER_S = 1_000_000_000
_MAX_TICKS = 2**64 - 1
_TRIES = 10
_ASKED = 3
_NOISE_NS = 1000


@attrs.frozen(slots=True, repr=False)
class TimerfdRecord:
    """A timer."""

    clock: int
    settime_flags: int
    """TFD_TIMER_*, as it was set."""
    ticks: int
    """Expirations that were not read."""
    interval_ns: int
    expires_ns: int
    """By `clock_of`, as the process sees it; 0: not armed."""

    def __attrs_post_init__(self) -> None:
        """Refuse what is no timer."""
        if self.clock not in _CLOCKS:
            raise ValueError(f"no timerfd has clock {self.clock}")
        if not 0 <= self.ticks <= _MAX_TICKS or min(self.interval_ns, self.expires_ns) < 0:
            raise ValueError("a timer has no negative time, and counts in 64 bits")


def clock_of(clock: int, settime_flags: int) -> int:
    """Return the clock by which a timer expires."""
    if not settime_flags & TFD_TIMER_ABSTIME and _CLOCKS[clock] == time.CLOCK_REALTIME:
        return time.CLOCK_MONOTONIC
    return _CLOCKS[clock]


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return file.info.timerfd is not None


def problem(file: OpenFile, _table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    assert file.info.timerfd is not None
    if file.info.timerfd.clock_id not in _CLOCKS:
        return Problem(f"is a timer of clock {file.info.timerfd.clock_id}, which is not supported")
    return None


def ask(file: OpenFile) -> list[Call]:
    """See `Kind.ask`."""
    timer = file.info.timerfd
    assert timer is not None
    clock = _ask_clock(clock_of(timer.clock_id, timer.settime_flags))
    gettime = call(NR.timerfd_gettime, file.fd, Out(_INTERVAL_AND_VALUE.size))
    return [clock, *[gettime, clock] * _ASKED]


def _ask_clock(clock: int) -> Call:
    return call(NR.clock_gettime, clock, Out(_TIMESPEC.size))


def _nanoseconds(reply: Reply) -> int:
    seconds, nanoseconds = _TIMESPEC.unpack(reply.outs[0])
    return int(seconds * _NS_PER_S + nanoseconds)


def capture(file: OpenFile, table: FdTable, replies: list[Reply]) -> TimerfdRecord:
    """See `Kind.capture`."""
    expect("reading a timer", replies)
    now_ns, left_ns = _find_best(replies)
    timer = _read(file, table)
    if timer.left_ns == 0:
        # It has expired this instant: a moment later that is certainly counted.
        timer = _read(file, table)
    return make_record(timer, now_ns, left_ns)


def _find_best(replies: list[Reply]) -> tuple[int, int]:
    """Return clock and time left, as of the last question."""
    clocks = [_nanoseconds(reply) for reply in replies[::2]]
    times = [_INTERVAL_AND_VALUE.unpack(reply.outs[0]) for reply in replies[1::2]]
    lefts = [left_s * _NS_PER_S + left_ns for _, _, left_s, left_ns in times]
    interval_s, interval_ns, _, _ = times[-1]
    return find_best(clocks, lefts, interval_s * _NS_PER_S + interval_ns)


def find_best(clocks: list[int], lefts: list[int], interval_ns: int) -> tuple[int, int]:
    """Return clock and time left as of the last question, by that which was disturbed least.

    The clock after a question counts: a timer may be taken to expire late, by nanoseconds, but
    never early.

    Args:
        clocks: before the first question, between them, and after the last.
        lefts: the answers.
        interval_ns: after which it expires again.
    """
    if not lefts[-1]:
        return clocks[-1], 0
    gaps = [after - before for before, after in pairwise(clocks)]
    best = gaps.index(min(gaps))
    expires_ns = clocks[best + 1] + lefts[best]
    if interval_ns:
        # It may have expired since that question.
        expired_ns = clocks[-1] + lefts[-1] - expires_ns + _NOISE_NS
        expires_ns += max(0, expired_ns // interval_ns) * interval_ns
    return clocks[-1], max(1, expires_ns - clocks[-1])


def _read(file: OpenFile, table: FdTable) -> TimerFd:
    info = read_fdinfo(table.pid, file.fd)
    if info is None or info.timerfd is None:
        raise TargetGone(table.pid)
    return info.timerfd


def make_record(timer: TimerFd, now_ns: int, left_ns: int) -> TimerfdRecord:
    """Return the record.

    Args:
        timer: what fdinfo says, after the time that is left was asked for.
        now_ns: `clock_of`, right after that.
        left_ns: what was left; 0 if it was not armed, or expired that very instant.
    """
    expires_ns = now_ns + left_ns
    if timer.left_ns == 0:
        if timer.ticks and timer.interval_ns:
            # The ticks hold this expiration: the next one comes an interval later.
            expires_ns += timer.interval_ns
        elif timer.ticks or not left_ns:
            expires_ns = 0
    return TimerfdRecord(
        clock=timer.clock_id,
        settime_flags=timer.settime_flags,
        ticks=timer.ticks,
        interval_ns=timer.interval_ns,
        expires_ns=expires_ns,
    )


def check_host(record: TimerfdRecord) -> Iterator[Problem]:
    """See `Kind.check_host`: timers that wake the machine need a privilege."""
    try:
        os.close(_make(record))
    except OSError as error:
        yield Problem(
            f"is a timer of clock {record.clock}, which we may not make here ({error.strerror})",
            "give the restore CAP_WAKE_ALARM",
        )


def _make(record: TimerfdRecord) -> Fd:
    return Fd(syscall(NR.timerfd_create, record.clock, _CLOSE_ON_EXEC))


def open_again(record: TimerfdRecord, flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    fd = _make(record)
    set_status_flags(fd, flags)
    return fd


def attach(record: TimerfdRecord, fd: RemoteFd, attaching: Attaching) -> Restore:
    """See `Kind.attach`: inside, where the clocks are the process's own."""
    if fd in attaching.replaced_fds:
        return
    ask_clock = _ask_clock(clock_of(record.clock, record.settime_flags))
    (now,) = yield [ask_clock]
    for _ in range(_TRIES):
        arming = plan_arming(record, _nanoseconds(now))
        set_time = call(NR.timerfd_settime, fd, record.settime_flags, In(arming.when), 0)
        *done, now = yield [set_time, *arming.set_ticks(fd), ask_clock]
        expect("arming a timer", done)
        if not arming.ticks or _nanoseconds(now) < arming.expires_ns:
            break
        # It expired before its ticks were set, which has overwritten that: count it, and again.


@attrs.frozen(slots=True, repr=False)
class Arming:
    """How a timer is brought to where it must be."""

    when: bytes
    """A `struct itimerspec`."""
    ticks: int
    expires_ns: int
    """When it expires next; far away if never."""

    def set_ticks(self, fd: RemoteFd) -> Iterator[Call]:
        """Yield the call that sets the ticks, if there are any."""
        if self.ticks:
            yield call(NR.ioctl, fd, TFD_IOC_SET_TICKS, In(self.ticks.to_bytes(8, "little")))


def plan_arming(record: TimerfdRecord, now_ns: int) -> Arming:
    """Count what has expired since, and say when it expires next.

    Args:
        record: the timer.
        now_ns: `clock_of`.
    """
    expires_ns, ticks = record.expires_ns, record.ticks
    if expires_ns and expires_ns <= now_ns:
        missed = 1
        if record.interval_ns:
            missed += (now_ns - expires_ns) // record.interval_ns
            expires_ns += missed * record.interval_ns
        else:
            expires_ns = 0
        ticks = min(ticks + missed, _MAX_TICKS)
    is_absolute = record.settime_flags & TFD_TIMER_ABSTIME
    value_ns = expires_ns if is_absolute or not expires_ns else expires_ns - now_ns
    interval, value = divmod(record.interval_ns, _NS_PER_S), divmod(value_ns, _NS_PER_S)
    return Arming(_INTERVAL_AND_VALUE.pack(*interval, *value), ticks, expires_ns or 2**64)


TIMERFD = Kind(
    "timerfd",
    TimerfdRecord,
    matches=matches,
    problem=problem,
    ask=ask,
    capture=capture,
    check_host=check_host,
    open=open_again,
    attach=attach,
)
