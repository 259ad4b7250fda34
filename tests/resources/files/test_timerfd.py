"""When a timerfd expires, and how many ticks it has; pure."""

import struct

import attrs
import pytest

from ckpt.kernel.procfs.fdinfo import TimerFd
from ckpt.resources.files.timerfd import (
    TimerfdRecord,
    clock_of,
    find_best,
    make_record,
    plan_arming,
)

S = 1_000_000_000
MONOTONIC = 1
ABSTIME = 1


def timer(ticks=0, left_ns=0, interval_ns=0):
    return TimerFd(
        clock_id=MONOTONIC, ticks=ticks, settime_flags=0, left_ns=left_ns, interval_ns=interval_ns
    )


def record(**fields):
    given = {"settime_flags": 0, "ticks": 0, "interval_ns": 0, "expires_ns": 0} | fields
    return TimerfdRecord(clock=MONOTONIC, **given)


@pytest.mark.parametrize(
    ("seen", "left_ns", "expires_ns"),
    [
        (timer(left_ns=3), 5, 105),
        (timer(left_ns=3, ticks=7, interval_ns=10), 5, 105),
        # never armed, disarmed with an interval, expired long ago
        (timer(), 0, 0),
        (timer(interval_ns=10), 0, 0),
        (timer(ticks=1), 0, 0),
        # expired between the two questions, or at the very instant of the first
        (timer(ticks=1), 5, 0),
        (timer(ticks=1, interval_ns=10), 5, 115),
        (timer(ticks=4, interval_ns=10), 0, 110),
        # and that is not counted yet
        (timer(), 5, 105),
    ],
)
def test_when_it_expires(seen, left_ns, expires_ns):
    made = make_record(seen, 100, left_ns)
    assert (made.expires_ns, made.ticks) == (expires_ns, seen.ticks)


@pytest.mark.parametrize(
    ("timer", "now_ns", "value_ns", "ticks", "expires_ns"),
    [
        (record(expires_ns=9 * S), 4 * S, 5 * S, 0, 9 * S),
        (record(expires_ns=9 * S, settime_flags=ABSTIME), 4 * S, 9 * S, 0, 9 * S),
        (record(expires_ns=9 * S, ticks=3, interval_ns=S), 4 * S, 5 * S, 3, 9 * S),
        (record(ticks=3), 4 * S, 0, 3, 2**64),
        # what was missed
        (record(expires_ns=9 * S), 9 * S, 0, 1, 2**64),
        (record(expires_ns=9 * S, settime_flags=ABSTIME), 99 * S, 0, 1, 2**64),
        (record(expires_ns=10 * S, interval_ns=3 * S), 14 * S, 2 * S, 2, 16 * S),
        (
            record(expires_ns=10 * S, interval_ns=3 * S, settime_flags=ABSTIME),
            13 * S,
            16 * S,
            2,
            16 * S,
        ),
        (record(expires_ns=1, interval_ns=1, ticks=2**64 - 2), 9, 1, 2**64 - 1, 10),
    ],
)
def test_how_it_is_armed(timer, now_ns, value_ns, ticks, expires_ns):
    arming = plan_arming(timer, now_ns)
    interval_s, interval_ns, value_s, value_rest_ns = struct.unpack("<4q", arming.when)
    assert interval_s * S + interval_ns == timer.interval_ns
    assert value_s * S + value_rest_ns == value_ns
    assert (arming.ticks, arming.expires_ns) == (ticks, expires_ns)
    assert len(list(arming.set_ticks(3))) == (ticks > 0)


def test_by_which_clock():
    assert [clock_of(clock, ABSTIME) for clock in (0, 1, 7, 8, 9)] == [0, 1, 7, 0, 7]
    assert [clock_of(clock, 0) for clock in (0, 1, 7, 8, 9)] == [1, 1, 7, 1, 7]


def test_records_that_cannot_be():
    good = record(expires_ns=1)
    for wrong in ({"clock": 2}, {"ticks": -1}, {"ticks": 2**64}, {"expires_ns": -1}):
        with pytest.raises(ValueError, match="timer"):
            attrs.evolve(good, **wrong)


@pytest.mark.parametrize(
    ("clocks", "lefts", "interval_ns", "best"),
    [
        # undisturbed; disturbed at the last question; at the first
        ([10, 11, 12, 13], [90, 89, 88], 0, (13, 88)),
        ([10, 11, 12, 7013], [90, 89, 88], 0, (7013, 1)),
        ([10_000, 11_000, 12_000, 42_000], [90_000, 89_000, 88_000], 0, (42_000, 59_000)),
        ([10_000, 50_000, 51_000, 52_000], [90_000, 50_000, 49_000], 0, (52_000, 49_000)),
        # expired in between: once, again and again
        ([10, 11, 12, 13], [1, 0, 0], 0, (13, 0)),
        ([10_000, 11_000, 60_000, 90_000], [9_000, 60_000, 30_000], 100_000, (90_000, 30_000)),
        ([10_000, 11_000, 60_000, 90_000], [9_000, 10_000, 10_000], 20_000, (90_000, 10_000)),
    ],
)
def test_the_least_disturbed_question_counts(clocks, lefts, interval_ns, best):
    assert find_best(clocks, lefts, interval_ns) == best
