"""Signals: what a process does about each, which are blocked, and which wait to be delivered.

Kernel: rt_sigaction(2), sigaltstack(2), rt_sigqueueinfo(2), rt_tgsigqueueinfo(2) as raw calls
inside the process; PTRACE_PEEKSIGINFO (Linux 3.10) and PTRACE_GETSIGMASK; `SigPnd` and `ShdPnd`
of /proc/PID/status for what is pending without a queue entry.

A process may send itself any siginfo, so queued signals come back with their sender, code and
value, in their order. They are queued while everything is blocked and stay so until the thread is
let go. Not exactly as it was:

- A pending SIGSTOP comes back as a stop of the process when it is let go.
- Of a stopped process, an unblocked pending signal with a number below SIGSTOP's acts before the
  process stops again.
- A pending timer signal is restored as a plain one: its overrun count starts anew.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs

from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.procfs.status import parse_signal_masks
from ckpt.process.remote import Call, In, Out, Reply, call
from ckpt.resources.base import Capture, Later, Rebuilt, Resource, Restore, Stage, Stopped, expect

_SIGKILL, _SIGSTOP = 9, 19
N_SIGNALS = 64
SETTABLE = tuple(sig for sig in range(1, N_SIGNALS + 1) if sig not in (_SIGKILL, _SIGSTOP))
"""The signals whose action can be chosen."""

_ACTION = struct.Struct("<QQQQ")
_SIGSET_BYTES = 8
_STACK = struct.Struct("<QixxxxQ")
_SS_ONSTACK, _SS_DISABLE = 1, 2

_SI_TIMER = -2
_SI_CODE_AT, _SI_SYS_PRIVATE_AT = 8, 32

_Sender = Callable[[int, bytes], Call]
"""Makes the call that queues a signal with its siginfo."""


@attrs.frozen(slots=True, repr=False)
class SignalAction:
    """What happens when a signal is delivered: the kernel's `struct sigaction`."""

    signal: int
    handler: int
    """Address of a function; 0 the default, 1 ignored."""
    flags: int
    restorer: int
    mask: int


@attrs.frozen(slots=True, repr=False)
class SignalsRecord:
    """What the threads of a process share."""

    actions: tuple[SignalAction, ...]
    """Those that are not the default."""
    pending: tuple[bytes, ...]
    """`siginfo_t` of each signal that waits for any thread, oldest first; 128 bytes."""


@attrs.frozen(slots=True, repr=False)
class ThreadSignalsRecord:
    """What each thread has for itself."""

    blocked: int
    """Bit n - 1 is signal n."""
    stack_at: int
    """The alternative stack (sigaltstack(2))."""
    stack_flags: int
    stack_bytes: int
    pending: tuple[bytes, ...]
    """`siginfo_t` of each signal that waits for this thread, oldest first."""


def capture(stopped: Stopped) -> Capture[SignalsRecord]:
    """Peek at the shared queue and ask for every action."""
    pending = _pending(stopped, shared=True)
    replies = yield _ASK_ACTIONS
    return Later(lambda: SignalsRecord(tuple(_iter_actions(replies)), pending))


_ASK_ACTIONS = [call(NR.rt_sigaction, sig, 0, Out(_ACTION.size), _SIGSET_BYTES) for sig in SETTABLE]


def _iter_actions(replies: Iterable[Reply]) -> Iterator[SignalAction]:
    for sig, reply in zip(SETTABLE, replies, strict=True):
        handler, flags, restorer, mask = _ACTION.unpack(reply.outs[0])
        if handler or flags or mask:
            yield SignalAction(sig, handler, flags, restorer, mask)


def _pending(stopped: Stopped, *, shared: bool) -> tuple[bytes, ...]:
    status = parse_signal_masks(stopped.status_text)
    bare = status.shared_pending if shared else status.pending
    if not bare:
        return ()
    queue = ptrace.peek_siginfo(stopped.tid, shared=shared)
    for info in queue:
        bare &= ~signal_bit(_signal_of(info))
    # Where the queue was full, the kernel only notes that the signal came: from no one.
    queue += [
        struct.pack("<i", sig).ljust(ptrace.SIGINFO_SIZE, b"\0")
        for sig in range(1, N_SIGNALS + 1)
        if bare & signal_bit(sig)
    ]
    return tuple(info for info in queue if _signal_of(info) != _SIGKILL)


def signal_bit(sig: int) -> int:
    """Return the bit of a signal in a mask."""
    return 1 << (sig - 1)


def _signal_of(info: bytes) -> int:
    return int(struct.unpack_from("<i", info)[0])


def restore(record: SignalsRecord, rebuilt: Rebuilt) -> Restore:
    """Set every action, then queue: setting one to "ignored" would empty the queue of it."""
    known = {action.signal: action for action in record.actions}
    replies = yield [_set_action(known.get(sig, _default(sig))) for sig in SETTABLE]
    expect("setting signal actions", replies)
    yield from _queue(
        rebuilt,
        record.pending,
        lambda sig, info: call(NR.rt_sigqueueinfo, rebuilt.number, sig, In(info)),
    )


def _default(sig: int) -> SignalAction:
    return SignalAction(sig, 0, 0, 0, 0)


def _set_action(action: SignalAction) -> Call:
    raw = _ACTION.pack(action.handler, action.flags, action.restorer, action.mask)
    return call(NR.rt_sigaction, action.signal, In(raw), 0, _SIGSET_BYTES)


def _queue(rebuilt: Rebuilt, pending: tuple[bytes, ...], send: _Sender) -> Restore:
    task = rebuilt.task
    queued = 0
    calls = []
    for info in pending:
        sig = _signal_of(info)
        if sig == _SIGSTOP:
            task.deferred_stop = True
            continue
        queued |= signal_bit(sig)
        calls.append(send(sig, _sendable(info)))
    # A batch ends by a signal that its task would not notice: none of those that it queues.
    task.reserved |= queued
    replies = yield calls
    expect("queueing pending signals", replies)


def _sendable(info: bytes) -> bytes:
    (code,) = struct.unpack_from("<i", info, _SI_CODE_AT)
    if code != _SI_TIMER:
        return info
    # By this word the kernel would look for a timer to arm again when the signal is taken.
    return info[:_SI_SYS_PRIVATE_AT] + bytes(4) + info[_SI_SYS_PRIVATE_AT + 4 :]


def capture_thread(stopped: Stopped) -> Capture[ThreadSignalsRecord]:
    """Peek at the thread's own queue and ask for its alternative stack."""
    pending, sigmask = _pending(stopped, shared=False), stopped.task.sigmask
    replies = yield _ASK_STACK
    return Later(lambda: _thread_record_of(sigmask, pending, replies))


_ASK_STACK = [call(NR.sigaltstack, 0, Out(_STACK.size))]


def _thread_record_of(
    sigmask: int, pending: tuple[bytes, ...], replies: Sequence[Reply]
) -> ThreadSignalsRecord:
    at, flags, size = _STACK.unpack(replies[0].outs[0])
    return ThreadSignalsRecord(sigmask, at, flags & ~_SS_ONSTACK, size, pending)


def restore_thread(record: ThreadSignalsRecord, rebuilt: Rebuilt) -> Restore:
    """Set the alternative stack, queue, and say which mask the thread gets when it is let go."""
    task = rebuilt.task
    if not record.stack_flags & _SS_DISABLE:
        raw = _STACK.pack(record.stack_at, record.stack_flags, record.stack_bytes)
        expect("setting an alternative stack", (yield [call(NR.sigaltstack, In(raw), 0)]))
    task.sigmask = record.blocked
    task.disturbed = True
    yield from _queue(
        rebuilt,
        record.pending,
        lambda sig, info: call(NR.rt_tgsigqueueinfo, rebuilt.number, task.inner, sig, In(info)),
    )


SIGNALS = Resource("signals", SignalsRecord, Stage.LATE, capture=capture, restore=restore)
THREAD_SIGNALS = Resource(
    "thread_signals",
    ThreadSignalsRecord,
    Stage.LATE,
    capture=capture_thread,
    restore=restore_thread,
)
