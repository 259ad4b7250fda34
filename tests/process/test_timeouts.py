"""Which calls have a relative timeout, and what is left of it."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.kernel.arch import NR
from ckpt.process import timeouts
from ckpt.process.timeouts import NS_PER_MS, NS_PER_S, Unit, timeout_of

POINTER = 0x7F00_0000_1000
FUTEX_WAIT, FUTEX_WAIT_BITSET, FUTEX_PRIVATE, FUTEX_REALTIME = 0, 9, 128, 256


def words(**at):
    """Return six argument words; `words(a3=5)` sets the fourth."""
    return tuple(at.get(f"a{index}", 0) for index in range(6))


@pytest.mark.parametrize(
    ("nr", "arguments", "argument", "unit"),
    [
        (NR.poll, words(a0=POINTER, a1=1, a2=500), 2, Unit.MILLISECONDS),
        (NR.epoll_wait, words(a3=1), 3, Unit.MILLISECONDS),
        (NR.epoll_pwait, words(a3=0x7FFF_FFFF), 3, Unit.MILLISECONDS),
        (NR.epoll_pwait2, words(a3=POINTER), 3, Unit.TIMESPEC),
        (NR.rt_sigtimedwait, words(a0=POINTER, a2=POINTER), 2, Unit.TIMESPEC),
        (NR.semtimedop, words(a3=POINTER), 3, Unit.TIMESPEC),
        (NR.nanosleep, words(a0=POINTER), 0, Unit.TIMESPEC),
        (NR.clock_nanosleep, words(a0=1, a2=POINTER), 2, Unit.TIMESPEC),
        (NR.futex, words(a0=POINTER, a1=FUTEX_WAIT, a3=POINTER), 3, Unit.TIMESPEC),
        (
            NR.futex,
            words(a1=FUTEX_WAIT | FUTEX_PRIVATE | FUTEX_REALTIME, a3=POINTER),
            3,
            Unit.TIMESPEC,
        ),
    ],
)
def test_a_relative_timeout_is_found(nr, arguments, argument, unit):
    found = timeout_of(nr, arguments)
    assert found is not None
    assert (found.argument, found.unit) == (argument, unit)


@pytest.mark.parametrize(
    ("nr", "arguments"),
    [
        (NR.read, words(a0=3, a1=POINTER, a2=100)),
        (NR.poll, words(a2=0xFFFF_FFFF)),
        (NR.poll, words(a2=0xFFFF_FFFF_FFFF_FFFF)),
        (NR.poll, words(a2=0)),
        (NR.epoll_wait, words(a3=0xDEAD_0000_FFFF_FFFF)),
        (NR.rt_sigtimedwait, words(a2=0)),
        (NR.clock_nanosleep, words(a0=1, a1=1, a2=POINTER)),
        (NR.futex, words(a1=FUTEX_WAIT_BITSET, a3=POINTER)),
        (NR.futex, words(a1=FUTEX_WAIT, a3=0)),
        (NR.restart_syscall, words(a2=500)),
        (-1, words(a2=500)),
        (100_000, words(a2=500)),
    ],
)
def test_an_absolute_or_missing_timeout_is_none(nr, arguments):
    assert timeout_of(nr, arguments) is None


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**62))
def test_milliseconds_never_end_too_early_nor_a_whole_one_too_late(timeout_ms, slept_ns):
    left_ms = timeouts.shorten_milliseconds(timeout_ms, slept_ns)
    assert left_ms >= 0
    exact_ns = max(0, timeout_ms * NS_PER_MS - slept_ns)
    assert exact_ns <= left_ms * NS_PER_MS < exact_ns + NS_PER_MS


@given(st.integers(0, 2**33), st.integers(0, NS_PER_S - 1), st.integers(0, 2**62))
def test_a_timespec_keeps_every_nanosecond(seconds, nanoseconds, slept_ns):
    raw = struct.pack("<qq", seconds, nanoseconds)
    left_s, left_ns = struct.unpack("<qq", timeouts.shorten_timespec(raw, slept_ns))
    assert 0 <= left_ns < NS_PER_S
    expected = max(0, seconds * NS_PER_S + nanoseconds - slept_ns)
    assert left_s * NS_PER_S + left_ns == expected


def test_a_timeval_counts_microseconds():
    raw = struct.pack("<qq", 2, 500)
    assert struct.unpack("<qq", timeouts.shorten_timespec(raw, 1_000_400_000, 1000)) == (1, 100)


def test_what_the_kernel_writes_back_is_found_in_the_right_unit():
    assert timeouts.written_back(NR.select, words(a4=POINTER)) == (POINTER, 1000)
    assert timeouts.written_back(NR.pselect6, words(a4=POINTER)) == (POINTER, 1)
    assert timeouts.written_back(NR.ppoll, words(a2=POINTER)) == (POINTER, 1)
    assert timeouts.written_back(NR.ppoll, words(a4=POINTER)) is None
    assert timeouts.written_back(NR.pause, words(a2=POINTER, a4=POINTER)) is None
