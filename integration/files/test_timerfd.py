"""Timers that are read: what is left, what has expired, by which clock."""

import ctypes
import os
import select
import struct
import time

import attrs
import pytest

from ckpt.kernel.arch import NR
from ckpt.kernel.inotify import IN_ATTRIB, inotify_add_watch, inotify_init
from ckpt.kernel.procfs.fdinfo import read_fdinfo
from ckpt.process.remote import Out, call
from integration.files.processes import brought_back, encoded, opened_by, rebuilt
from integration.files.processes import capture as capture_files

libc = ctypes.CDLL(None, use_errno=True)
S = 1_000_000_000
ABSTIME, CANCEL_ON_SET = 1, 2
REALTIME_ALARM, BOOTTIME_ALARM = 8, 9
HOUR = 3600 * S


def make(clock, value_ns=0, interval_ns=0, flags=0):
    fd = libc.timerfd_create(clock, os.O_NONBLOCK)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    times = ctypes.create_string_buffer(
        struct.pack("<4q", *divmod(interval_ns, S), *divmod(value_ns, S))
    )
    if value_ns or interval_ns:
        assert libc.timerfd_settime(fd, flags, times, None) == 0, os.strerror(ctypes.get_errno())
    return fd


def wait_until_readable(fd):
    assert select.select([fd], [], [], 30)[0]


def left_ns(built, fd):
    (reply,) = built.run([call(NR.timerfd_gettime, fd, Out(32))])
    assert reply.ok
    seconds, nanoseconds = struct.unpack("<16xqq", reply.outs[0])
    return seconds * S + nanoseconds


def ticks_of(built, fd):
    return struct.unpack("<Q", built.read(fd, 8))[0]


def timers(record):
    return [one.record for one in record.descriptions if one.kind == "timerfd"]


def with_timers(record, change):
    """Return the record with every timer changed, as if it came from another time."""
    return encoded(
        attrs.evolve(
            record,
            descriptions=tuple(
                attrs.evolve(one, record=change(one.record)) if one.kind == "timerfd" else one
                for one in record.descriptions
            ),
        )
    )


@pytest.mark.parametrize(
    ("clock", "flags"),
    [
        (time.CLOCK_MONOTONIC, 0),
        (time.CLOCK_MONOTONIC, ABSTIME),
        (time.CLOCK_BOOTTIME, 0),
        (time.CLOCK_BOOTTIME, ABSTIME),
        (time.CLOCK_REALTIME, 0),
        (time.CLOCK_REALTIME, ABSTIME),
        (time.CLOCK_REALTIME, ABSTIME | CANCEL_ON_SET),
        (REALTIME_ALARM, 0),
        (REALTIME_ALARM, ABSTIME),
        (BOOTTIME_ALARM, 0),
        (BOOTTIME_ALARM, ABSTIME),
    ],
)
def test_what_is_left_goes_on(clock, flags):
    base = {REALTIME_ALARM: time.CLOCK_REALTIME, BOOTTIME_ALARM: time.CLOCK_BOOTTIME}
    value = HOUR
    if flags & ABSTIME:
        value += time.clock_gettime_ns(base.get(clock, clock))
    before_ns = time.monotonic_ns()
    with brought_back(lambda: make(clock, value, 7 * S, flags)) as (record, built):
        (timer,) = timers(record)
        assert (timer.clock, timer.settime_flags) == (clock, flags)
        assert (timer.ticks, timer.interval_ns) == (0, 7 * S)
        left = left_ns(built, 3)
        passed_ns = time.monotonic_ns() - before_ns
        assert HOUR - passed_ns <= left <= HOUR
        (again,) = timers(built.capture())
        # Never early; late by as long as a call may take on a busy machine.
        assert 0 <= again.expires_ns - timer.expires_ns <= S // 2
        assert read_fdinfo(built.pid, 3).timerfd.settime_flags == flags


def test_disarmed_ones_stay_so():
    def prepare():
        make(time.CLOCK_MONOTONIC)  # 3: never armed
        make(time.CLOCK_MONOTONIC, 0, 5 * S)  # 4: disarmed, with an interval

    with brought_back(prepare) as (record, built):
        assert [(t.expires_ns, t.interval_ns) for t in timers(record)] == [(0, 0), (0, 5 * S)]
        assert timers(built.capture()) == timers(record)
        for fd in (3, 4):
            with pytest.raises(BlockingIOError):
                built.read(fd, 8)


def test_expirations_that_were_not_read_are_kept():
    def prepare():
        make(time.CLOCK_MONOTONIC, 1)  # 3: once
        make(time.CLOCK_MONOTONIC, 1, HOUR)  # 4: again, but not soon
        wait_until_readable(3)
        wait_until_readable(4)

    with brought_back(prepare) as (record, built):
        once, again = timers(record)
        assert (once.ticks, once.expires_ns) == (1, 0)
        assert again.ticks == 1
        assert HOUR - 60 * S < left_ns(built, 4) <= HOUR
        assert (ticks_of(built, 3), ticks_of(built, 4)) == (1, 1)
        with pytest.raises(BlockingIOError):
            built.read(3, 8)


def test_a_timer_that_expired_long_ago_and_often_is_counted_in_full():
    """The kernel itself counts only when somebody asks."""
    started_ns = time.monotonic_ns()

    def prepare():
        fd = make(time.CLOCK_MONOTONIC, S // 1000, S // 1000)
        other = make(time.CLOCK_MONOTONIC, S // 10)
        wait_until_readable(fd)
        wait_until_readable(other)

    with brought_back(prepare) as (record, built):
        assert timers(record)[0].ticks >= 99
        n_ticks = ticks_of(built, 3)
        assert 99 <= n_ticks <= (time.monotonic_ns() - started_ns) // (S // 1000)


@pytest.mark.parametrize("flags", [0, ABSTIME])
def test_what_expires_before_the_process_is_back_is_counted_and_the_beat_kept(flags):
    start = HOUR + (time.monotonic_ns() if flags else 0)

    def prepare():
        make(time.CLOCK_MONOTONIC, start, 100 * S, flags)  # 3
        make(time.CLOCK_MONOTONIC, start, 0, flags)  # 4

    with opened_by(prepare) as pid:
        record = capture_files(pid)
    earlier = HOUR + 250 * S
    first = timers(record)[0].expires_ns
    moved = with_timers(
        record, lambda timer: attrs.evolve(timer, expires_ns=timer.expires_ns - earlier, ticks=5)
    )
    with rebuilt(moved, pid) as built:
        assert (ticks_of(built, 3), ticks_of(built, 4)) == (5 + 3, 5 + 1)
        (again, _) = timers(built.capture())
        assert 50 * S <= (again.expires_ns - first) % (100 * S) < 50 * S + S // 2


def test_it_expires_in_the_restored_process():
    def prepare():
        make(time.CLOCK_MONOTONIC, HOUR)

    with opened_by(prepare) as pid:
        record = capture_files(pid)
    soon = with_timers(
        record, lambda timer: attrs.evolve(timer, expires_ns=time.monotonic_ns() + S // 5)
    )
    with rebuilt(soon, pid) as built:
        (polled,) = built.run([call(NR.epoll_create1, 0)])
        assert polled.ok
        pidfd = os.pidfd_open(built.pid)
        try:
            ours = libc.syscall(NR.pidfd_getfd, pidfd, 3, 0)
            wait_until_readable(ours)
            os.close(ours)
        finally:
            os.close(pidfd)
        assert time.monotonic_ns() >= timers(soon)[0].expires_ns
        assert ticks_of(built, 3) == 1


def test_one_that_is_replaced_is_left_alone(tmp_path):
    def prepare():
        make(time.CLOCK_MONOTONIC, HOUR)  # 3
        inotify_add_watch(inotify_init(), "/", IN_ATTRIB)  # 4
        os.pidfd_open(os.getpid())  # 5

    other = tmp_path / "other"
    other.touch()
    chosen = {fd: str(other) for fd in (3, 4, 5)}
    with brought_back(prepare, inherit=chosen) as (_, built):
        links = [os.readlink(f"/proc/{built.pid}/fd/{fd}") for fd in (3, 4, 5)]
        assert links == [str(other)] * 3
