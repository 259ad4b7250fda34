"""Which system calls sleep with a relative timeout, and where their arguments hold it.

Pure. Calls that are not here have an absolute timeout or none. Of select, pselect6 and ppoll the
kernel itself writes the time left into their argument when they are interrupted.

Source: the manual page of each call.
"""

import enum
import struct
from collections.abc import Sequence

import attrs

from ckpt.kernel.arch import NR

NS_PER_S, NS_PER_MS, NS_PER_US = 1_000_000_000, 1_000_000, 1000
TIMESPEC = struct.Struct("<qq")

_TIMER_ABSTIME = 1
_FUTEX_COMMAND = 0x7F
_FUTEX_WAIT = 0


class Unit(enum.Enum):
    """How an argument holds a timeout."""

    MILLISECONDS = enum.auto()
    """An `int`; negative: for ever."""
    TIMESPEC = enum.auto()
    """A pointer to seconds and nanoseconds; NULL: for ever."""


@attrs.frozen(slots=True, repr=False)
class Timeout:
    """Where a call holds its relative timeout; arguments count from 0."""

    argument: int
    unit: Unit
    left: int | None = None
    """The argument that points to where the kernel writes the time left, if it is not NULL."""


_TIMEOUTS = {
    NR.poll: Timeout(2, Unit.MILLISECONDS),
    NR.epoll_wait: Timeout(3, Unit.MILLISECONDS),
    NR.epoll_pwait: Timeout(3, Unit.MILLISECONDS),
    NR.epoll_pwait2: Timeout(3, Unit.TIMESPEC),
    NR.rt_sigtimedwait: Timeout(2, Unit.TIMESPEC),
    NR.semtimedop: Timeout(3, Unit.TIMESPEC),
    NR.io_getevents: Timeout(4, Unit.TIMESPEC),
    NR.io_pgetevents: Timeout(4, Unit.TIMESPEC),
    NR.nanosleep: Timeout(0, Unit.TIMESPEC, left=1),
    NR.clock_nanosleep: Timeout(2, Unit.TIMESPEC, left=3),
    NR.futex: Timeout(3, Unit.TIMESPEC),
}


def timeout_of(nr: int, arguments: Sequence[int]) -> Timeout | None:
    """Return where call `nr` holds its relative timeout; None if it has none.

    Args:
        nr: the call.
        arguments: its six argument words, unsigned.
    """
    timeout = _TIMEOUTS.get(NR(nr)) if nr in _KNOWN else None
    if timeout is None or _is_absolute(nr, arguments):
        return None
    word = arguments[timeout.argument]
    if timeout.unit is Unit.MILLISECONDS:
        return timeout if milliseconds(word) > 0 else None
    return timeout if word else None


_KNOWN = frozenset(int(nr) for nr in _TIMEOUTS)


def _is_absolute(nr: int, arguments: Sequence[int]) -> bool:
    if nr == NR.clock_nanosleep:
        return bool(arguments[1] & _TIMER_ABSTIME)
    return nr == NR.futex and arguments[1] & _FUTEX_COMMAND != _FUTEX_WAIT


def milliseconds(word: int) -> int:
    """Return the `int` in a register: its lower half, signed."""
    low = word & 0xFFFF_FFFF
    return low - (1 << 32) if low >> 31 else low


def shorten_milliseconds(word: int, slept_ns: int) -> int:
    """Return the register with what is left of its timeout; never shorter than that."""
    left_ns = max(0, milliseconds(word) * NS_PER_MS - slept_ns)
    return -(-left_ns // NS_PER_MS)


def shorten_timespec(raw: bytes, slept_ns: int, unit_ns: int = 1) -> bytes:
    """Return the timespec of what is left; with `unit_ns` 1000 it is a timeval."""
    seconds, units = TIMESPEC.unpack(raw)
    left_ns = max(0, seconds * NS_PER_S + units * unit_ns - slept_ns)
    return TIMESPEC.pack(left_ns // NS_PER_S, left_ns % NS_PER_S // unit_ns)


_WRITTEN_BACK = {NR.select: (4, NS_PER_US), NR.pselect6: (4, 1), NR.ppoll: (2, 1)}


def written_back(nr: int, arguments: Sequence[int]) -> tuple[int, int] | None:
    """Return where the kernel has written what is left of the timeout, and its unit.

    Returns:
        (address, nanoseconds in a unit of the second word); None: it writes nothing, or had none.
    """
    for known, (argument, unit_ns) in _WRITTEN_BACK.items():
        if nr == known and arguments[argument]:
            return arguments[argument], unit_ns
    return None
