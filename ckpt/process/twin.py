"""The twin: a copy of a frozen process's memory that is read when the process runs again.

    target ── middle ── twin            middle shares the memory, makes the twin, exits, is reaped
    target              twin ── init    nobody of the target's waits for it, or hears of its end

A copy-on-write clone costs the target as long as copying its page tables takes (13 ms per GiB, of
pages of 4 KiB), and later a fault for each page that it writes while the twin is there. The twin
never runs code of the target: it is seized while it sleeps in the arena's copy, with EXITKILL, so
it ends with us; until it is seized it asks now and then whether we are there. It shares the table
of open files, so no file is held open by it.

What fork leaves out (MADV_DONTFORK, MADV_WIPEONFORK, shared memory) is read before the thaw.

Kernel: clone(2), wait4(2), ptrace(2).
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import attrs

from ckpt import fault
from ckpt.errors import NotPermitted, TargetGone
from ckpt.kernel import ptrace
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.procfs import status
from ckpt.process.arena import Arena
from ckpt.process.freezer import Frozen
from ckpt.process.task import look_at
from ckpt.process.uninterrupted import uninterrupted
from ckpt.units import Pid, Tid

_BYTES_PER_MS = 82_000_000
_BEGIN_MS = 1.0
_NAP_S = 0.0002
_SEIZE_S = 1.0
_WALL = 0x4000_0000
"""__WALL (wait.h): also what does not tell its end by SIGCHLD."""


def cost_ms(populated_bytes: int) -> float:
    """Return how long making a twin takes, roughly: 13 ms for 1 GiB of pages that exist."""
    return _BEGIN_MS + populated_bytes / _BYTES_PER_MS


@attrs.frozen(slots=True, repr=False)
class Twin:
    """A process that does nothing and has the memory that the target had."""

    pid: Pid


def find_obstacle(frozen: Frozen, *, adopts_orphans: bool) -> str:
    """Return why this process cannot have a twin that it would not notice; empty if it can.

    Args:
        frozen: the process.
        adopts_orphans: it has PR_SET_CHILD_SUBREAPER, so the twin would become its child.
    """
    if frozen.is_nested:
        return "it lives in a pid namespace of its own"
    if adopts_orphans:
        return "it adopts orphans (PR_SET_CHILD_SUBREAPER), and would be told of the end of one"
    if status.read_status(frozen.pid).seccomp_mode:
        return "it has a seccomp filter, which might forbid it to clone itself"
    return ""


@contextlib.contextmanager
def twin(arena: Arena, frozen: Frozen) -> Iterator[Twin | None]:
    """Lend a twin of the frozen process, made by its first thread; None if the kernel refuses.

    It is gone after the block, or when we are.
    """
    refused = fault.is_off("twin")
    pid = 0 if refused else arena.run_code(frozen.leader, arch.twinned(Pid(os.getpid())))
    if pid <= 0:
        yield None
        return
    try:
        yield Twin(Pid(pid)) if _seize(Tid(pid)) else None
    finally:
        with uninterrupted():
            _end(Pid(pid))


def _seize(tid: Tid) -> bool:
    """Stop the twin where it sleeps, and let it end with us; False if it is gone, or does not stop.

    The target stands still meanwhile, so the wait has an end: it goes on without a twin as well.
    """
    deadline_s = time.monotonic() + _SEIZE_S
    try:
        ptrace.seize(tid, ptrace.Option.EXITKILL)
        ptrace.interrupt(tid)
        while (stop := look_at(tid, reap=False)) is None:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_NAP_S)
    except (TargetGone, NotPermitted):
        return False
    return not stop.gone


def _end(pid: Pid) -> None:
    """Kill the twin and reap our half of it: init, whose child it is, reaps the rest."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError, TargetGone, NotPermitted):
        os.waitpid(pid, _WALL)
