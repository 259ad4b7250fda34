"""The small files of /proc/PID: limits, POSIX timers, auxv, time offsets, counters.

Source: proc_pid_limits(5), proc_pid_timers(5), proc_pid_auxv(5), getauxval(3),
time_namespaces(7), proc_pid_io(5), fs/proc/base.c.
"""

import os
import struct

import attrs

from ckpt.errors import TargetGone
from ckpt.kernel.failures import proc_failures_of
from ckpt.kernel.procfs.files import read_bytes, read_text
from ckpt.units import Pid, Tid

RLIM_INFINITY = 2**64 - 1

_LIMIT_NAMES = (
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
)
# The position is the number of RLIMIT_* (include/uapi/asm-generic/resource.h; x86 and arm64).

_NAME_WIDTH = 25


@attrs.frozen(slots=True, repr=False)
class Limit:
    """One resource limit, in the unit of its resource; RLIM_INFINITY for none."""

    soft: int
    hard: int


def parse_limits(text: str) -> dict[int, Limit]:
    """Parse /proc/PID/limits into RLIMIT_* number -> limits.

    Raises:
        ValueError: a limit with an unknown name, or a malformed line.
    """
    limits = {}
    for line in text.split("\n")[1:]:
        if line:
            name = line[:_NAME_WIDTH].rstrip()
            soft, hard = line[_NAME_WIDTH:].split()[:2]
            if name not in _LIMIT_NAMES:
                raise ValueError(f"unknown resource limit {name!r}")
            limits[_LIMIT_NAMES.index(name)] = Limit(_limit(soft), _limit(hard))
    return limits


def _limit(word: str) -> int:
    return RLIM_INFINITY if word == "unlimited" else int(word)


def read_limits(pid: Pid) -> dict[int, Limit]:
    """Read /proc/PID/limits (prlimit on another user's process needs CAP_SYS_RESOURCE).

    Raises:
        TargetGone: the process ended.
    """
    return parse_limits(read_text(pid, "limits"))


@attrs.frozen(slots=True, repr=False)
class PosixTimer:
    """One timer of timer_create; how long it has left only the process itself can ask."""

    timer_id: int
    signo: int
    sigev_value: int
    """The pointer-sized word that the signal brings."""
    notify: str
    """`signal`, `none` or `thread`."""
    to_thread: bool
    """SIGEV_THREAD_ID: the signal goes to the thread `target`."""
    target: int
    """Process or thread; 0 if that thread is gone."""
    clock_id: int
    """As timer_create takes it; the CPU clocks of process and thread come as -6 and -2."""


def parse_timers(text: str) -> list[PosixTimer]:
    """Parse /proc/PID/timers, in the kernel's order.

    Raises:
        ValueError: a line is not of the known form.
    """
    return [_parse_timer(block) for block in _timer_blocks(text)]


def _timer_blocks(text: str) -> list[dict[str, str]]:
    blocks: list[dict[str, str]] = []
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if not colon:
            continue
        if key == "ID":
            blocks.append({})
        if not blocks:
            raise ValueError(f"/proc/PID/timers starts with {line!r}")
        blocks[-1][key] = value.strip()
    return blocks


def _parse_timer(fields: dict[str, str]) -> PosixTimer:
    try:
        signo, _, value = fields["signal"].partition("/")
        notify, _, target = fields["notify"].partition("/")
        whom, _, number = target.partition(".")
        return PosixTimer(
            timer_id=int(fields["ID"]),
            signo=int(signo),
            sigev_value=int(value, 16),
            notify=notify,
            to_thread=whom == "tid",
            target=int(number),
            clock_id=int(fields["ClockID"]),
        )
    except KeyError as error:
        raise ValueError(f"a timer has no field {error}") from error


def read_timers(pid: Pid) -> list[PosixTimer]:
    """Read /proc/PID/timers (CONFIG_CHECKPOINT_RESTORE).

    Raises:
        TargetGone: the process ended (or this kernel has no such file).
        NotPermitted: the process is another user's.
    """
    return parse_timers(read_text(pid, "timers"))


AT_NULL = 0
AT_SYSINFO_EHDR = 33
AT_MINSIGSTKSZ = 51

_AUXV_ENTRY = struct.Struct("=QQ")


def parse_auxv(raw: bytes) -> list[tuple[int, int]]:
    """Parse an auxiliary vector: (AT_ type, value) pairs in order, without the closing AT_NULL.

    Raises:
        ValueError: there is no AT_NULL, or half a pair before it.
    """
    pairs: list[tuple[int, int]] = []
    for at in range(0, len(raw) - _AUXV_ENTRY.size + 1, _AUXV_ENTRY.size):
        kind, value = _AUXV_ENTRY.unpack_from(raw, at)
        if kind == AT_NULL:
            return pairs
        pairs.append((kind, value))
    if not raw:
        return pairs
    raise ValueError("the auxiliary vector does not end in AT_NULL")


def read_auxv(pid: Pid) -> list[tuple[int, int]]:
    """Read /proc/PID/auxv.

    Raises:
        TargetGone: the process ended, or never had memory (a kernel thread).
        NotPermitted: ptrace access is refused.
    """
    return parse_auxv(read_bytes(pid, "auxv"))


@attrs.frozen(slots=True, repr=False)
class TimensOffsets:
    """What a time namespace adds to the clocks of the host, in nanoseconds (may be negative)."""

    monotonic_ns: int
    boottime_ns: int


def parse_timens_offsets(text: str) -> TimensOffsets:
    """Parse /proc/PID/timens_offsets, of the namespace that the *children* of PID will have.

    Raises:
        ValueError: a clock is missing or a line malformed.
    """
    offsets = {}
    for line in text.split("\n"):
        if line:
            clock, seconds, nanoseconds = line.split()
            # Numbers in older kernels, names since.
            name = {"1": "monotonic", "7": "boottime"}.get(clock, clock)
            offsets[name] = int(seconds) * 1_000_000_000 + int(nanoseconds)
    try:
        return TimensOffsets(offsets["monotonic"], offsets["boottime"])
    except KeyError as error:
        raise ValueError(f"timens_offsets has no clock {error}") from error


def read_timens_offsets(pid: Pid) -> TimensOffsets:
    """Read /proc/PID/timens_offsets; zeros where the kernel has no time namespaces.

    Raises:
        TargetGone: the process ended.
    """
    try:
        return parse_timens_offsets(read_text(pid, "timens_offsets"))
    except TargetGone:
        if os.path.exists(f"/proc/{pid}/stat"):
            return TimensOffsets(0, 0)
        raise


def parse_exec_start_ns(text: str) -> int | None:
    """Return `se.exec_start` of /proc/PID/sched in nanoseconds, None if the file lacks it.

    The scheduler's clock when the thread's running time was last counted: unchanged between two
    readings means that the thread has not run.
    """
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon and key.strip() == "se.exec_start":
            whole, _, fraction = value.strip().partition(".")
            return int(whole) * 1_000_000 + int(fraction.ljust(6, "0")[:6])
    return None


def read_exec_start_ns(pid: Pid, tid: Tid) -> int | None:
    """Read `se.exec_start` of a thread, in nanoseconds; None without CONFIG_SCHED_DEBUG.

    Raises:
        TargetGone: `pid` has no such thread (any more).
    """
    try:
        text = read_text(pid, f"task/{tid}/sched")
    except TargetGone:
        if os.path.exists(f"/proc/{pid}/task/{tid}/stat"):
            return None
        raise
    return parse_exec_start_ns(text)


@attrs.frozen(slots=True, repr=False)
class IoCounters:
    """/proc/PID/io: how much a process (threads that ended included) has read and written."""

    rchar_bytes: int
    """By read calls, whatever was behind them."""
    wchar_bytes: int
    n_read_calls: int
    n_write_calls: int
    read_bytes: int
    """From storage."""
    write_bytes: int
    cancelled_write_bytes: int


def parse_io(text: str) -> IoCounters:
    """Parse /proc/PID/io.

    Raises:
        ValueError: a counter is missing or malformed.
    """
    fields = dict(line.split(": ", 1) for line in text.split("\n") if line)
    try:
        return IoCounters(
            rchar_bytes=int(fields["rchar"]),
            wchar_bytes=int(fields["wchar"]),
            n_read_calls=int(fields["syscr"]),
            n_write_calls=int(fields["syscw"]),
            read_bytes=int(fields["read_bytes"]),
            write_bytes=int(fields["write_bytes"]),
            cancelled_write_bytes=int(fields["cancelled_write_bytes"]),
        )
    except KeyError as error:
        raise ValueError(f"/proc/PID/io has no counter {error}") from error


def read_io(pid: Pid) -> IoCounters:
    """Read /proc/PID/io.

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access is refused.
    """
    return parse_io(read_text(pid, "io"))


def read_oom_score_adj(pid: Pid) -> int:
    """Return the process's adjustment for the out-of-memory killer, -1000 to 1000.

    Raises:
        TargetGone: the process ended.
    """
    return int(read_text(pid, "oom_score_adj"))


def read_personality(pid: Pid | Tid) -> int:
    """Return the thread's personality(2) bits.

    Raises:
        TargetGone: the task ended.
        NotPermitted: ptrace access is refused.
    """
    return int(read_text(pid, "personality"), 16)


def write_oom_score_adj(pid: Pid, value: int) -> None:
    """Set the process's adjustment for the out-of-memory killer, -1000 to 1000.

    Raises:
        TargetGone: the process ended.
        NotPermitted: a lowering without CAP_SYS_RESOURCE.
    """
    with proc_failures_of(pid, "set oom_score_adj"):
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)
