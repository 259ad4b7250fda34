"""ptrace(2), typed: requests on one thread, and what waitpid says about it.

Stands on python-ptrace's raw call (`ptrace.binding`); its debugger classes attach with SIGSTOP
and kill on quit, so they are not used. Every failure is `TargetGone` (ESRCH: the thread has ended
or is not stopped) or `NotPermitted`; other errors are bugs and stay `OSError`.

Source: ptrace(2), include/uapi/linux/ptrace.h (Linux 6.18).
"""

import ctypes
import enum
import errno
import os
import signal
from typing import NoReturn

import attrs

from ckpt.errors import NotPermitted, TargetGone
from ckpt.kernel.arch.x86_64 import Registers
from ckpt.kernel.binding import PtraceError, iovec_struct
from ckpt.kernel.binding import ptrace as raw_ptrace
from ckpt.units import RemoteAddr, Tid

SIGINFO_SIZE = 128
MAX_XSTATE = 64 * 1024
"""More than any processor has; the room that `get_xstate` makes."""
_SIGSET_SIZE = 8
_WALL = 0x40000000
_STOPPED = 0x7F
"""The low byte of waitpid's status word, if it is of a stop."""


class Request(enum.IntEnum):
    """Requests of include/uapi/linux/ptrace.h that we make."""

    CONT = 7
    SINGLESTEP = 9
    DETACH = 17
    SYSCALL = 24
    SETOPTIONS = 0x4200
    GETEVENTMSG = 0x4201
    GETSIGINFO = 0x4202
    GETREGSET = 0x4204
    SETREGSET = 0x4205
    SEIZE = 0x4206
    INTERRUPT = 0x4207
    LISTEN = 0x4208
    PEEKSIGINFO = 0x4209
    GETSIGMASK = 0x420A
    SETSIGMASK = 0x420B
    SECCOMP_GET_FILTER = 0x420C
    SECCOMP_GET_METADATA = 0x420D
    GET_RSEQ_CONFIGURATION = 0x420F


class RegSet(enum.IntEnum):
    """Register sets (include/uapi/linux/elf.h)."""

    PRSTATUS = 1
    X86_XSTATE = 0x202


class Option(enum.IntFlag):
    """PTRACE_O_*."""

    NONE = 0
    TRACESYSGOOD = 0x1
    TRACEFORK = 0x2
    TRACEVFORK = 0x4
    TRACECLONE = 0x8
    TRACEEXEC = 0x10
    TRACEEXIT = 0x40
    EXITKILL = 0x100000
    SUSPEND_SECCOMP = 0x200000


class Event(enum.IntEnum):
    """PTRACE_EVENT_*."""

    FORK = 1
    VFORK = 2
    CLONE = 3
    EXEC = 4
    VFORK_DONE = 5
    EXIT = 6
    SECCOMP = 7
    STOP = 128


class Kind(enum.Enum):
    """What a wait status means, as a closed set."""

    EXITED = enum.auto()
    KILLED = enum.auto()
    SIGNAL = enum.auto()
    """Signal-delivery-stop: the signal has been taken from the queue and waits for our word."""
    GROUP_STOP = enum.auto()
    INTERRUPTED = enum.auto()
    """PTRACE_EVENT_STOP with SIGTRAP: our INTERRUPT, or a new thread's first stop."""
    EVENT = enum.auto()


@attrs.frozen(slots=True, repr=False)
class WaitStatus:
    """One thread's state change, from waitpid(2)."""

    tid: Tid
    kind: Kind
    sig: int
    """SIGNAL, GROUP_STOP, KILLED: the signal's number; EXITED: the exit code."""
    event: Event | None = None

    @property
    def gone(self) -> bool:
        """Tell whether the thread has ended."""
        return self.kind in (Kind.EXITED, Kind.KILLED)


def parse_wait_status(tid: Tid, status: int) -> WaitStatus:
    """Return the meaning of waitpid's status word for a seized thread."""
    if os.WIFEXITED(status):
        return WaitStatus(tid, Kind.EXITED, os.WEXITSTATUS(status))
    if os.WIFSIGNALED(status):
        return WaitStatus(tid, Kind.KILLED, os.WTERMSIG(status))
    sig, event = os.WSTOPSIG(status), status >> 16
    if event == Event.STOP:
        if sig == signal.SIGTRAP:
            return WaitStatus(tid, Kind.INTERRUPTED, 0, Event.STOP)
        return WaitStatus(tid, Kind.GROUP_STOP, sig, Event.STOP)
    if event:
        return WaitStatus(tid, Kind.EVENT, 0, Event(event))
    return WaitStatus(tid, Kind.SIGNAL, sig)


def word_of_stop(sig: int) -> int:
    """Return waitpid's status word for a thread that has stopped with a signal."""
    return sig << 8 | _STOPPED


def wait(tid: Tid, *, block: bool = True) -> WaitStatus | None:
    """Wait for the next state change of `tid`; None if there is none yet and not `block`.

    Raises:
        TargetGone: we are not (any more) the tracer or the parent of `tid`.
    """
    try:
        pid, status = os.waitpid(tid, _WALL | (0 if block else os.WNOHANG))
    except ChildProcessError:
        raise TargetGone(tid) from None
    return parse_wait_status(tid, status) if pid else None


def _raise(error: PtraceError, tid: Tid, request: Request) -> NoReturn:
    number = error.errno
    cause = OSError(number, os.strerror(number or 0))
    if number == errno.ESRCH:
        raise TargetGone(tid) from cause
    if number == errno.EPERM:
        raise NotPermitted(
            f"trace thread {tid} (PTRACE_{request.name})",
            "run as root or with CAP_SYS_PTRACE; another debugger may already trace it",
        ) from cause
    raise cause


def _request(request: Request, tid: Tid, addr: int = 0, data: int = 0) -> int:
    try:
        return int(raw_ptrace(request, tid, addr, data))
    except PtraceError as error:
        _raise(error, tid, request)


def seize(tid: Tid, options: Option) -> None:
    """Become the tracer without stopping the thread."""
    _request(Request.SEIZE, tid, 0, options)


def interrupt(tid: Tid) -> None:
    """Ask a seized thread to stop; `wait` then says INTERRUPTED or GROUP_STOP."""
    _request(Request.INTERRUPT, tid)


def listen(tid: Tid) -> None:
    """Leave a thread in its group-stop, but let it report further events."""
    _request(Request.LISTEN, tid)


def cont(tid: Tid, sig: int = 0) -> None:
    """Let a stopped thread run on, delivering `sig` if it is not 0."""
    _request(Request.CONT, tid, 0, sig)


def singlestep(tid: Tid) -> None:
    """Let a stopped thread run one instruction."""
    _request(Request.SINGLESTEP, tid)


def cont_to_syscall(tid: Tid) -> None:
    """Let a stopped thread run to the next entry into, or exit from, a system call.

    The stop reads as SIGTRAP but is no signal: unlike that of a single step, it leaves the thread's
    action for SIGTRAP alone.
    """
    _request(Request.SYSCALL, tid)


def detach(tid: Tid, sig: int = 0) -> None:
    """Let a stopped thread go for good, delivering `sig` if it is not 0."""
    _request(Request.DETACH, tid, 0, sig)


def set_options(tid: Tid, options: Option) -> None:
    """Replace the tracing options of a stopped thread."""
    _request(Request.SETOPTIONS, tid, 0, options)


def get_event_message(tid: Tid) -> int:
    """Return the message of the last event stop: a new thread's id, an exit status."""
    message = ctypes.c_ulong()
    _request(Request.GETEVENTMSG, tid, 0, ctypes.addressof(message))
    return message.value


def get_siginfo(tid: Tid) -> bytes:
    """Return the `siginfo_t` (128 bytes) of the signal at a signal-delivery-stop."""
    buffer = ctypes.create_string_buffer(SIGINFO_SIZE)
    _request(Request.GETSIGINFO, tid, 0, ctypes.addressof(buffer))
    return buffer.raw


def get_registers(tid: Tid) -> Registers:
    """Return the general registers (NT_PRSTATUS) of a stopped thread."""
    registers = Registers()
    iovec = iovec_struct(ctypes.addressof(registers), ctypes.sizeof(registers))
    _request(Request.GETREGSET, tid, RegSet.PRSTATUS, ctypes.addressof(iovec))
    return registers


def set_registers(tid: Tid, registers: Registers) -> None:
    """Set the general registers (NT_PRSTATUS) of a stopped thread."""
    iovec = iovec_struct(ctypes.addressof(registers), ctypes.sizeof(registers))
    _request(Request.SETREGSET, tid, RegSet.PRSTATUS, ctypes.addressof(iovec))


def get_xstate(tid: Tid) -> bytes:
    """Return the whole XSAVE area (NT_X86_XSTATE, standard format) of a stopped thread."""
    buffer = ctypes.create_string_buffer(MAX_XSTATE)
    iovec = iovec_struct(ctypes.addressof(buffer), len(buffer))
    _request(Request.GETREGSET, tid, RegSet.X86_XSTATE, ctypes.addressof(iovec))
    return buffer.raw[: iovec.len]


def set_xstate(tid: Tid, xstate: bytes) -> None:
    """Set the whole XSAVE area of a stopped thread; `xstate` as `get_xstate` returned it."""
    buffer = ctypes.create_string_buffer(xstate, len(xstate))
    iovec = iovec_struct(ctypes.addressof(buffer), len(xstate))
    _request(Request.SETREGSET, tid, RegSet.X86_XSTATE, ctypes.addressof(iovec))


def get_sigmask(tid: Tid) -> int:
    """Return the blocked signals, bit n - 1 for signal n.

    For a task in sigsuspend and its like: the mask that it had before (Linux 5.4: ptrace.c asks
    for the saved one), so that restarting the call is right.
    """
    mask = ctypes.c_uint64()
    _request(Request.GETSIGMASK, tid, _SIGSET_SIZE, ctypes.addressof(mask))
    return mask.value


def set_sigmask(tid: Tid, mask: int) -> None:
    """Set the blocked signals of a stopped thread."""
    value = ctypes.c_uint64(mask)
    _request(Request.SETSIGMASK, tid, _SIGSET_SIZE, ctypes.addressof(value))


class _PeekSiginfoArgs(ctypes.Structure):
    """`struct ptrace_peeksiginfo_args`."""

    _fields_ = (("off", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("nr", ctypes.c_int32))


_PEEKSIGINFO_SHARED = 1
_PEEK_BATCH = 32


def peek_siginfo(tid: Tid, *, shared: bool) -> list[bytes]:
    """Return the queued signals' `siginfo_t` (128 bytes each), oldest first, leaving them queued.

    `shared`: those sent to the process; otherwise those sent to this thread. Linux 3.10.
    """
    queue: list[bytes] = []
    buffer = ctypes.create_string_buffer(_PEEK_BATCH * SIGINFO_SIZE)
    while True:
        args = _PeekSiginfoArgs(len(queue), _PEEKSIGINFO_SHARED if shared else 0, _PEEK_BATCH)
        n = _request(Request.PEEKSIGINFO, tid, ctypes.addressof(args), ctypes.addressof(buffer))
        raw = buffer.raw
        queue += [raw[i * SIGINFO_SIZE : (i + 1) * SIGINFO_SIZE] for i in range(n)]
        if n < _PEEK_BATCH:
            return queue


class raw_rseq_configuration(ctypes.Structure):  # noqa: N801
    """`struct ptrace_rseq_configuration`."""

    rseq_abi_pointer: int
    rseq_abi_size: int
    signature: int
    _fields_ = (
        ("rseq_abi_pointer", ctypes.c_uint64),
        ("rseq_abi_size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


@attrs.frozen(slots=True, repr=False)
class RseqConfiguration:
    """Where a thread registered its `struct rseq` (rseq(2), Linux 4.18)."""

    pointer: RemoteAddr
    size: int
    signature: int


def get_rseq_configuration(tid: Tid) -> RseqConfiguration | None:
    """Return the registration of a stopped thread, None if there is none. Linux 5.13."""
    raw = raw_rseq_configuration()
    try:
        _request(Request.GET_RSEQ_CONFIGURATION, tid, ctypes.sizeof(raw), ctypes.addressof(raw))
    except OSError as error:
        if error.errno in (errno.EIO, errno.EINVAL):  # a kernel without CONFIG_RSEQ
            return None
        raise
    return parse_rseq_configuration(raw)


def parse_rseq_configuration(raw: raw_rseq_configuration) -> RseqConfiguration | None:
    """Return what the kernel has told; None if nothing is registered."""
    if not raw.rseq_abi_pointer:
        return None
    return RseqConfiguration(RemoteAddr(raw.rseq_abi_pointer), raw.rseq_abi_size, raw.signature)


class _SeccompMetadata(ctypes.Structure):
    """`struct seccomp_metadata`."""

    _fields_ = (("filter_off", ctypes.c_uint64), ("flags", ctypes.c_uint64))


_MAX_FILTER_BYTES = 4096 * 8
"""BPF_MAXINSNS instructions."""


def get_seccomp_filter(tid: Tid, index: int) -> bytes | None:
    """Return the program of a stopped thread's filter, None if it has no so many. Linux 4.4.

    Needs CAP_SYS_ADMIN, and a tracer that is not confined itself.

    Args:
        tid: the thread, which has filters.
        index: which one: 0 is the first that was installed.
    """
    buffer = ctypes.create_string_buffer(_MAX_FILTER_BYTES)
    try:
        n = _request(Request.SECCOMP_GET_FILTER, tid, index, ctypes.addressof(buffer))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        if error.errno == errno.EACCES:
            raise NotPermitted(
                f"read the seccomp filters of thread {tid}",
                "run as root, and not confined by seccomp",
            ) from error
        raise
    return ctypes.string_at(buffer, n * 8)


def get_seccomp_flags(tid: Tid, index: int) -> int:
    """Return the flags of a stopped thread's filter: SECCOMP_FILTER_FLAG_LOG or none. Linux 4.16.

    0 where the kernel does not tell.
    """
    raw = _SeccompMetadata(index, 0)
    try:
        _request(Request.SECCOMP_GET_METADATA, tid, ctypes.sizeof(raw), ctypes.addressof(raw))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EIO):
            return 0
        raise
    return int(raw.flags)
