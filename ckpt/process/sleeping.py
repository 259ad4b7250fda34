"""Who sleeps in a system call with a relative timeout, and since when: seen before the freeze.

Our stop wakes a thread, and with that the kernel's knowledge of how long it has slept is gone. So
it is asked before: /proc/PID/task/TID/syscall for the call, and `se.exec_start` of
/proc/PID/task/TID/sched for when the thread last ran, by the clock of its processor. To know what
that clock shows now, we run on that processor for a moment and read the same field of ours. After
the stop, `confirm` makes sure that it is still the same sleep; `interrupted.py` uses the result.

A call that the kernel continues after an earlier stop shows as restart_syscall. Which one it is is
told by the functions on its kernel stack (/proc/PID/task/TID/stack), or by the code before its
instruction.

Kernel: proc_pid_syscall(5); /proc/PID/sched needs CONFIG_SCHED_DEBUG; /proc/PID/stack needs
CONFIG_STACKTRACE and CAP_SYS_ADMIN. Where one is missing, the time is 0.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from threading import get_native_id

import attrs

from ckpt.errors import CkptError, TargetGone
from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.procfs import stat as procfs_stat
from ckpt.kernel.procfs import task as procfs_task
from ckpt.kernel.procfs.files import list_tids, read_text
from ckpt.process import memory
from ckpt.process.task import Task
from ckpt.process.timeouts import NS_PER_S, timeout_of
from ckpt.units import Pid, RemoteAddr, Tid

_MAX_CLOCK_ID = 16
_N_ARGUMENTS = 6

CONTINUED = frozenset({NR.nanosleep, NR.clock_nanosleep, NR.poll, NR.futex})
"""The calls that restart_syscall can stand for."""
_CONTINUED_BY = {
    "alarm_timer_nsleep_restart": NR.clock_nanosleep,
    "posix_cpu_nsleep_restart": NR.clock_nanosleep,
    "do_restart_poll": NR.poll,
    "futex_wait_restart": NR.futex,
}
_ENTRY = frozenset(
    {
        "do_syscall_64",
        "x64_sys_call",
        "__x64_sys_restart_syscall",
        "__do_sys_restart_syscall",
        "entry_SYSCALL_64_after_hwframe",
    }
)
"""What is on every stack. Of a nanosleep nothing else: /proc hides the functions that sleep."""


@attrs.frozen(slots=True, repr=False)
class BlockedCall:
    """The system call in which a thread sleeps: /proc/PID/task/TID/syscall."""

    nr: int
    arguments: tuple[int, ...]
    sp: int
    pc: int


@attrs.frozen(slots=True, repr=False)
class Asleep:
    """A thread that slept when it was looked at."""

    blocked: BlockedCall
    call: int
    """The call that it really is, if `blocked.nr` is restart_syscall."""
    n_sleeps: int | None
    """How often it had gone to sleep (voluntary context switches); None if the kernel hides it."""
    asleep_since_ns: int
    """CLOCK_MONOTONIC."""


@attrs.frozen(slots=True, repr=False)
class Sleep:
    """What is known of a call that was interrupted by our stop."""

    call: int
    slept_ns: int
    """Until the stop; 0 if that is not known."""


def parse_syscall(text: str) -> BlockedCall | None:
    """Parse /proc/PID/task/TID/syscall; None if the thread runs or sleeps outside any call."""
    words = text.split()
    if len(words) != _N_ARGUMENTS + 3:
        return None
    numbers = [int(word, 16) for word in words[1:]]
    return BlockedCall(int(words[0]), tuple(numbers[:_N_ARGUMENTS]), numbers[-2], numbers[-1])


def parse_n_sleeps(text: str) -> int | None:
    """Return `nr_voluntary_switches` of /proc/PID/sched; None if it is not there."""
    for line in text.split("\n"):
        key, _, value = line.partition(":")
        if key.strip() == "nr_voluntary_switches":
            return int(value)
    return None


def look(pid: Pid) -> dict[Tid, Asleep]:
    """Return the threads that sleep with a relative timeout, or in a call that was continued.

    About 0.03 ms for each thread that does not.
    """
    found: dict[Tid, tuple[BlockedCall, int]] = {}
    for tid in list_tids(pid):
        with contextlib.suppress(CkptError, OSError):
            blocked = parse_syscall(read_text(pid, f"task/{tid}/syscall"))
            call = _call_of(pid, tid, blocked) if blocked else None
            if blocked and call is not None and _matters(blocked, call):
                found[tid] = blocked, call
    return _since_when(pid, found) if found else {}


def _matters(blocked: BlockedCall, call: int) -> bool:
    return blocked.nr == NR.restart_syscall or timeout_of(call, blocked.arguments) is not None


def _call_of(pid: Pid, tid: Tid, blocked: BlockedCall) -> int | None:
    if blocked.nr != NR.restart_syscall:
        return blocked.nr
    with contextlib.suppress(CkptError, OSError):
        call = parse_stack(read_text(pid, f"task/{tid}/stack"))
        if call is NR.nanosleep and blocked.arguments[0] < _MAX_CLOCK_ID:
            return NR.clock_nanosleep
        if call is not None:
            return call
    return read_call(tid, blocked.pc)


def parse_stack(text: str) -> NR | None:
    """Return the call that /proc/PID/task/TID/stack shows to be continued; None if none.

    nanosleep stands for clock_nanosleep too: the kernel continues them by the same function.
    """
    functions = [
        line.rpartition(" ")[2].partition("+")[0].partition(".")[0] for line in text.splitlines()
    ]
    for function in functions:
        if function in _CONTINUED_BY:
            return _CONTINUED_BY[function]
    return NR.nanosleep if functions and _ENTRY.issuperset(functions) else None


def read_call(tid: Tid, pc: int) -> int | None:
    """Return the number that the code before the `syscall` instruction puts into eax.

    Args:
        tid: whose memory.
        pc: behind that instruction.

    Returns:
        One of `CONTINUED`, or None: the number is made further away.
    """
    n_bytes = 5 + len(arch.SYSCALL_INSN)
    try:
        code = memory.read(tid, RemoteAddr(pc - n_bytes), n_bytes)
    except TargetGone:
        return None
    # mov eax, imm32; or the end of mov rax, imm32 (48 c7 c0)
    if code.endswith(arch.SYSCALL_INSN) and code[0] in (0xB8, 0xC0):
        nr = int.from_bytes(code[1:5], "little")
        return nr if nr in CONTINUED else None
    return None


def _since_when(pid: Pid, found: Mapping[Tid, tuple[BlockedCall, int]]) -> dict[Tid, Asleep]:
    seen = {tid: _read_scheduled(pid, tid) for tid in found}
    ahead_ns = _compare_clocks({one.processor for one in seen.values() if one})
    now_ns = time.monotonic_ns()
    asleep = {}
    for tid, (blocked, call) in found.items():
        one = seen[tid]
        if one and one.processor in ahead_ns:
            since_ns = min(now_ns, one.ran_at_ns + ahead_ns[one.processor])
            asleep[tid] = Asleep(blocked, call, one.n_sleeps, since_ns)
        else:
            asleep[tid] = Asleep(blocked, call, None, now_ns)
    return asleep


@attrs.frozen(slots=True, repr=False)
class _Scheduled:
    """What the scheduler tells of a thread."""

    processor: int
    ran_at_ns: int
    """When it last ran, by its processor's own clock."""
    n_sleeps: int | None


def _read_scheduled(pid: Pid, tid: Tid) -> _Scheduled | None:
    try:
        text = read_text(pid, f"task/{tid}/sched")
        processor = procfs_stat.read_task_stat(pid, tid).processor
    except CkptError:
        return None
    ran_at_ns = procfs_task.parse_exec_start_ns(text)
    return _Scheduled(processor, ran_at_ns, parse_n_sleeps(text)) if ran_at_ns else None


def _compare_clocks(processors: Iterable[int]) -> dict[int, int]:
    """Return by how much CLOCK_MONOTONIC is ahead of each processor's clock, in nanoseconds."""
    me, thread = Pid(os.getpid()), Tid(get_native_id())
    allowed = os.sched_getaffinity(0)
    ahead_ns = {}
    try:
        for processor in processors:
            with contextlib.suppress(CkptError, OSError):
                os.sched_setaffinity(0, {processor})
                os.sched_yield()
                ran_at_ns = procfs_task.read_exec_start_ns(me, thread)
                if ran_at_ns:
                    ahead_ns[processor] = time.monotonic_ns() - ran_at_ns
    finally:
        os.sched_setaffinity(0, allowed)
    return ahead_ns


def confirm(
    pid: Pid, asleep: Mapping[Tid, Asleep], tasks: Mapping[Tid, Task], stopped_at_s: float
) -> dict[Tid, Sleep]:
    """Return what still holds of `look`, now that all are stopped.

    Args:
        pid: the process.
        asleep: from `look`, just before the stop.
        tasks: the stopped threads.
        stopped_at_s: CLOCK_MONOTONIC when the first was asked to stop.
    """
    sleeps = {}
    for tid, before in asleep.items():
        task = tasks.get(tid)
        if task is not None and _is_same_call(before, task):
            slept_ns = 0
            if before.n_sleeps is not None and _n_sleeps_now(pid, tid) == before.n_sleeps + 1:
                # The one more is our stop.
                slept_ns = max(0, int(stopped_at_s * NS_PER_S) - before.asleep_since_ns)
            sleeps[tid] = Sleep(before.call, slept_ns)
    return sleeps


def _is_same_call(before: Asleep, task: Task) -> bool:
    now, then = task.registers, before.blocked
    return (
        not task.group_stopped
        and int(now.orig_rax) == then.nr
        and (int(now.rsp), int(now.rip)) == (then.sp, then.pc)
        and arguments_of(now) == then.arguments
    )


def arguments_of(registers: arch.Registers) -> tuple[int, ...]:
    """Return the six argument words of the call that the registers are in."""
    return tuple(int(getattr(registers, name)) for name in arch.ARGUMENT_REGISTERS)


def _n_sleeps_now(pid: Pid, tid: Tid) -> int | None:
    try:
        return parse_n_sleeps(read_text(pid, f"task/{tid}/sched"))
    except CkptError:
        return None
