"""How a thread comes back from a single call of ours, outside any arena, if we are killed in it.

    stack pointer of its own ->  | its functions'                        |
                                 | red zone, and what `interrupted.py`   |
                                 |   may have put below it               |
                                 | signal frame with its own state       |
    stack pointer in the call -> | address of `mov eax, 15; syscall`     |

The call is made by a `syscall; ret` of the target. While we trace it, it stops at the end of the
`syscall`; with us gone it runs on, into rt_sigreturn, which gives it registers, extended state and
mask. What stood on the stack before is put back when the thread has its own state again; where we
are killed before, what is lost belongs to no function (System V AMD64 ABI).

Only on the main stack, where that rule holds: a stack that a program has made itself, as for
coroutines, may end just below the stack pointer, with something of value behind it. Nor where the
code is not found, or with a shadow stack, on which no such `ret` is. There the call is made without
(`Task.run_single`), and a kill in it leaves the thread astray.
"""

import contextlib
from collections.abc import Iterator, Sequence

import attrs

from ckpt import fault
from ckpt.errors import TargetGone
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.procfs import maps
from ckpt.kernel.vm_burst import VmBurst
from ckpt.process import memory
from ckpt.process.gadgets import find_gadgets
from ckpt.process.task import Task
from ckpt.units import Pid, RemoteAddr, Tid, addr_range

_MAIN_STACK = "[stack]"
_SHADOW_STACK = b"shstk"
"""In the line x86_Thread_features of /proc/PID/status."""
_BELOW_RED_ZONE = 64
"""Bytes that `interrupted.mend` uses."""
_ALIGN = 64


@attrs.frozen(slots=True, repr=False)
class WayBack:
    """A frame for one thread, and the code that leads into it."""

    task: Task
    call_at: RemoteAddr
    """A `syscall; ret`."""
    frame_at: RemoteAddr
    frame: bytes
    stood: bytes
    """What was there instead."""


def find_way_back(task: Task, vmas: Sequence[maps.Vma]) -> WayBack | None:
    """Return how a stopped thread would come back without us; None if it could not.

    Args:
        task: the thread, in its own state.
        vmas: all mappings of the process.
    """
    gadgets = find_gadgets(vmas)
    stack = next((vma for vma in vmas if vma.path == _MAIN_STACK), None)
    if gadgets is None or stack is None or _SHADOW_STACK in task.status_text:
        return None
    if fault.is_off("way-back"):
        return None
    own = int(task.registers.rsp)
    end = own - arch.RED_ZONE - _BELOW_RED_ZONE
    at = RemoteAddr((end - arch.signal_frame_size(task.xstate)) & -_ALIGN)
    if own not in stack.span or at not in stack.span or stack.shared or not stack.writable:
        return None
    back_at = gadgets.return_at
    frame = arch.signal_frame(task.registers, task.xstate, task.sigmask, at, returns_to=back_at)
    code = (arch.SYSCALL_RET, gadgets.return_code)
    places = zip((gadgets.call_at, back_at, at), (*code, frame), strict=True)
    with contextlib.suppress(TargetGone):
        seen = memory.read_ranges(task.tid, [addr_range(at, len(what)) for at, what in places])
        known = b"".join(code)
        if seen.startswith(known):
            return WayBack(task, gadgets.call_at, at, frame, seen[len(known) :])
    return None


@contextlib.contextmanager
def laid(ways: Sequence[WayBack]) -> Iterator[dict[Tid, WayBack]]:
    """Write frames for the length of the block, in which the threads make their calls.

    Lends those that are written. Behind the block, where the threads have their own state again,
    what stood there before is put back.
    """
    laying, undoing = VmBurst(), VmBurst()
    for way in ways:
        laying.write(Pid(way.task.tid), [(way.frame_at, way.frame)])
        undoing.write(Pid(way.task.tid), [(way.frame_at, way.stood)])
    problems = laying.move()
    try:
        yield {
            way.task.tid: way
            for way, problem in zip(ways, problems, strict=True)
            if problem is None
        }
    finally:
        # Who has ended has no memory any more.
        undoing.move()
