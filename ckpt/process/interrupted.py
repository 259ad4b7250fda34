"""System calls that our stop interrupted: how each goes on as if nothing had been.

The kernel ends an interrupted call with one of its private errors, and restarts it by itself when
a task gets its registers back as they were (arch/x86/kernel/signal.c):

    -512, -513, -514   issued again with the same arguments (or EINTR, if a handler runs first)
    -516               continued by restart_syscall with the time that is left, which only the
                       kernel knows: nanosleep, clock_nanosleep, poll, futex with a relative timeout
    -EINTR             not restarted: epoll_wait, sigtimedwait, semtimedop, sockets with a timeout

In a live task the first two need nothing from us, except select, pselect6 and ppoll: they write
down the time that is left, from which the time of the stop is subtracted. A call of the third kind
becomes -514 (`mend`), its timeout shortened by the time already slept; else dumps in quick
succession would starve it. In a restored task the kernel knows nothing of a call with -516, so that
becomes -514 in the same way (`resume`).

How long a thread has slept `sleeping.py` knows, within these limits:

- Without /proc/PID/sched (no CONFIG_SCHED_DEBUG), or if the thread did anything between look and
  stop, the time slept before the stop is not subtracted.
- A thread that was woken and went on sleeping in the same call counts from its latest wakeup. So
  does a call that the kernel has continued after an earlier stop, in the image of a later one. (Not
  if the kernel has written down the time left: nanosleep with its second argument.)
- A timeout of the socket itself (SO_RCVTIMEO) starts anew with every stop.
- A shortened timeout stays in its register, as all arguments do. Code that keeps it there for its
  next call, which no function of a C library does, finds the shorter one.
- A continued call whose number neither kernel nor code tells ends with EINTR in a restored task.
"""

import contextlib

from ckpt.errors import CkptError
from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.procfs import maps
from ckpt.process import memory
from ckpt.process.sleeping import CONTINUED, Sleep, arguments_of, read_call
from ckpt.process.task import Task
from ckpt.process.timeouts import (
    TIMESPEC,
    Timeout,
    Unit,
    shorten_milliseconds,
    shorten_timespec,
    timeout_of,
    written_back,
)
from ckpt.units import Pid, RemoteAddr, Tid

NO_CALL = -1
_WORD = 0xFFFF_FFFF_FFFF_FFFF

_EINTR_MEANS_NOTHING_HAPPENED = arch.UNINTERRUPTED_ONLY | {
    *(NR.read, NR.readv, NR.recvfrom, NR.recvmsg, NR.recvmmsg, NR.accept, NR.accept4),
    *(NR.write, NR.writev, NR.sendto, NR.sendmsg, NR.connect),
}
"""The second part: sockets whose timeout is an option of their own (signal(7))."""


def describe(task: Task, sleep: Sleep | None) -> Sleep:
    """Return which call of a stopped task must go on; `NO_CALL` if none."""
    nr = _interrupted_call(task)
    if nr is None:
        return Sleep(NO_CALL, 0)
    if sleep is not None:
        return sleep
    if nr == NR.restart_syscall:
        known = read_call(task.tid, int(task.registers.rip))
        return Sleep(nr if known is None else known, 0)
    return Sleep(nr, 0)


def _interrupted_call(task: Task) -> int | None:
    nr = int(task.registers.orig_rax)
    if nr >> 63:
        return None
    result = arch.result_of(task.registers)
    if result == -arch.EINTR:
        # In group-stop it was the stop signal that ended the call, not we.
        ours = nr in _EINTR_MEANS_NOTHING_HAPPENED and not task.group_stopped
        return nr if ours else None
    return arch.interrupted_call(task.registers)


def mend(task: Task, sleep: Sleep | None, *, since_asked_ns: int, since_stopped_ns: int) -> None:
    """Before a live task is let go: let a call go on that the kernel would end with EINTR.

    Args:
        task: stopped, its registers as they were.
        sleep: from `sleeping.confirm`.
        since_asked_ns: how long ago the stop began, up to which `sleep` counts.
        since_stopped_ns: how long the task has stood still for sure.
    """
    if arch.result_of(task.registers) == -arch.ERESTARTNOHAND:
        _shorten_in_place(task, since_stopped_ns)
    if arch.result_of(task.registers) != -arch.EINTR:
        return
    described = describe(task, sleep)
    if described.call == NO_CALL:
        return
    registers = _reissued(task.registers, described.call)
    _shorten(task.tid, registers, described.call, described.slept_ns + since_asked_ns)
    task.registers = registers
    task.disturbed = True


def _shorten_in_place(task: Task, stopped_ns: int) -> None:
    """Subtract the time of the stop from what the kernel wrote down when it began."""
    found = written_back(int(task.registers.orig_rax), arguments_of(task.registers))
    if found is not None:
        at, unit_ns = RemoteAddr(found[0]), found[1]
        with contextlib.suppress(CkptError):
            left = memory.read(task.tid, at, TIMESPEC.size)
            memory.write(task.tid, at, shorten_timespec(left, stopped_ns, unit_ns))


def resume(tid: Tid, registers: arch.Registers, interrupted: Sleep) -> arch.Registers:
    """Return the registers with which a restored task goes on; its memory is in place.

    Args:
        tid: the task.
        registers: as they were when it was stopped.
        interrupted: from `describe`.
    """
    call = interrupted.call
    result = arch.result_of(registers)
    continued = result == -arch.ERESTART_RESTARTBLOCK
    if continued and call not in CONTINUED:
        return _ended(registers)
    if not continued and (result != -arch.EINTR or call == NO_CALL):
        return registers
    again = _reissued(registers, call)
    _shorten(tid, again, call, interrupted.slept_ns)
    return again


def _reissued(registers: arch.Registers, call: int) -> arch.Registers:
    """Return registers by which the kernel issues the call again, unless a handler runs first."""
    again = arch.copy_registers(registers)
    again.orig_rax = call
    again.rax = -arch.ERESTARTNOHAND & _WORD
    return again


def _ended(registers: arch.Registers) -> arch.Registers:
    ended = arch.copy_registers(registers)
    ended.rax = -arch.EINTR & _WORD
    return ended


def _shorten(tid: Tid, registers: arch.Registers, call: int, slept_ns: int) -> None:
    """Subtract from the call's relative timeout, if it has one, the time that it has had."""
    arguments = arguments_of(registers)
    timeout = timeout_of(call, arguments)
    if timeout is None:
        return
    if timeout.left is not None and arguments[timeout.left]:
        # The kernel has written there what is left.
        _set_argument(registers, timeout, arguments[timeout.left])
    elif timeout.unit is Unit.MILLISECONDS:
        left = shorten_milliseconds(arguments[timeout.argument], slept_ns)
        _set_argument(registers, timeout, left)
    elif slept_ns:
        # Where the memory is not as expected, the timeout starts anew.
        with contextlib.suppress(CkptError):
            at = RemoteAddr(arguments[timeout.argument])
            left_raw = shorten_timespec(memory.read(tid, at, TIMESPEC.size), slept_ns)
            spare = _find_spare(tid, int(registers.rsp))
            if spare is not None:
                memory.write(tid, spare, left_raw)
                _set_argument(registers, timeout, spare)


def _set_argument(registers: arch.Registers, timeout: Timeout, value: int) -> None:
    setattr(registers, arch.ARGUMENT_REGISTERS[timeout.argument], value)


def _find_spare(tid: Tid, sp: int) -> RemoteAddr | None:
    """Return 16 bytes of the stack that no function owns: below the red zone (AMD64 ABI)."""
    at = RemoteAddr((sp - arch.RED_ZONE - TIMESPEC.size) & ~15)
    if at // arch.PAGE_SIZE == sp // arch.PAGE_SIZE:
        return at
    here = [vma.span for vma in maps.read_maps(Pid(tid)) if sp in vma.span]
    return at if here and at in here[0] else None
