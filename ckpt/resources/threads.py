"""A thread: its name, and the addresses in its memory that the kernel works with.

- clear_child_tid: zeroed, and its futex woken, when the thread ends; what pthread_join waits for
- robust list: futexes that are marked when the thread ends while it holds them
- rseq: where the kernel keeps the number of the processor, and finds restartable sequences

Kernel: prctl(2) PR_GET_NAME, PR_SET_NAME, PR_GET_TID_ADDRESS (CONFIG_CHECKPOINT_RESTORE);
set_tid_address(2), get_robust_list(2), set_robust_list(2), rseq(2), PTRACE_GET_RSEQ_CONFIGURATION
(5.13). Thread-local storage is in the registers (`fs_base`) and in memory.

The thread's own use of PR_SET_SYSCALL_USER_DISPATCH is not captured: it comes back switched off. A
kernel without CONFIG_CHECKPOINT_RESTORE does not tell what is needed: refused before anything is
touched.
"""

from collections.abc import Iterator, Sequence

import attrs

from ckpt.errors import Finding
from ckpt.kernel import sched
from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import Prctl
from ckpt.kernel.procfs.files import list_tids
from ckpt.kernel.ptrace import RseqConfiguration
from ckpt.process.remote import In, Out, Reply, call
from ckpt.resources.at_once import AskedAtOnce
from ckpt.resources.base import (
    Capture,
    Later,
    Rebuilt,
    Resource,
    Restore,
    Stage,
    Stopped,
    Target,
    expect,
)
from ckpt.units import RemoteAddr

_NAME_BYTES = 16
_ADDRESS_BYTES = 8


@attrs.frozen(slots=True, repr=False)
class ThreadRecord:
    """What makes a task a thread of its C library."""

    name: bytes
    """At most 15 bytes, any but NUL."""
    clear_child_tid: int
    """Address, 0 if none; so the next two."""
    robust_list: int
    rseq_at: int
    rseq_bytes: int
    rseq_signature: int


def look(target: Target) -> Iterator[Finding]:
    """Refuse a kernel that keeps to itself what must be known; lay out what is asked of all."""
    if not target.features.posix_timers_listed:
        yield Finding(
            "kernel",
            "it was built without CONFIG_CHECKPOINT_RESTORE, so timers and threads cannot be read",
            "use another kernel",
        )
    target.notes[_ROBUST_LISTS] = AskedAtOnce(sched.RobustListBurst(list_tids(target.pid)).run)


_ROBUST_LISTS = "robust lists of threads"


def capture(stopped: Stopped) -> Capture[ThreadRecord]:
    """Ask the thread for its name and its addresses."""
    lists: AskedAtOnce[RemoteAddr] | None = stopped.notes.get(_ROBUST_LISTS)
    robust_list = lists.of(stopped) if lists else None
    if robust_list is None:
        robust_list, _ = sched.get_robust_list(stopped.tid)
    rseq = stopped.task.rseq
    replies = yield _QUESTIONS
    return Later(lambda: _record_of(robust_list, rseq, replies))


_QUESTIONS = [
    call(NR.prctl, Prctl.GET_NAME, Out(_NAME_BYTES)),
    call(NR.prctl, Prctl.GET_TID_ADDRESS, Out(_ADDRESS_BYTES)),
]


def _record_of(
    robust_list: int, rseq: RseqConfiguration | None, replies: Sequence[Reply]
) -> ThreadRecord:
    name, address = replies
    return ThreadRecord(
        name=name.outs[0].partition(b"\0")[0],
        clear_child_tid=int.from_bytes(address.outs[0], "little"),
        robust_list=robust_list,
        rseq_at=rseq.pointer if rseq else 0,
        rseq_bytes=rseq.size if rseq else 0,
        rseq_signature=rseq.signature if rseq else 0,
    )


def restore(record: ThreadRecord, _rebuilt: Rebuilt) -> Restore:
    """Register everything again; a task that was just made has nothing registered."""
    calls = [
        call(NR.prctl, Prctl.SET_NAME, In(record.name.ljust(_NAME_BYTES, b"\0"))),
        call(NR.set_tid_address, record.clear_child_tid),
        call(NR.set_robust_list, record.robust_list, sched.ROBUST_LIST_HEAD_BYTES),
    ]
    if record.rseq_at:
        calls.append(call(NR.rseq, record.rseq_at, record.rseq_bytes, 0, record.rseq_signature))
    expect("registering a thread", (yield calls))


THREAD = Resource("thread", ThreadRecord, Stage.THREAD, capture=capture, restore=restore, look=look)
