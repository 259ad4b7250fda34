"""Stop a process, all its threads, and let it go on as if nothing had been.

    with freeze(pid, features) as frozen:
        ...                              every thread is in a ptrace stop
                                         thawed here, whatever happened

New threads that appear while we stop the others are found by listing again until nothing is new: a
thread that is stopped makes none. A thread in group-stop stays in it; a signal that was already
taken from the queue is delivered before the thread stops.
"""

import contextlib
import os
import time
from collections.abc import Iterator

import attrs

from ckpt.errors import FreezeTimeout, NotPermitted, TargetGone, TargetRefused
from ckpt.kernel import ptrace
from ckpt.kernel.procfs import status
from ckpt.kernel.procfs.stat import read_task_stat
from ckpt.process import interrupted, sleeping
from ckpt.process.sleeping import Sleep
from ckpt.process.task import Task
from ckpt.process.timeouts import NS_PER_S
from ckpt.process.tree import list_tids, refuse_untouchable
from ckpt.units import Pid, Tid

_SIGSTOP = 19
_SPIN_S = 0.002
_NAP_S = 0.0002
DEFAULT_TIMEOUT_S = 10.0


@attrs.define(slots=True, eq=False)
class Frozen:
    """A process of which every thread is stopped under our ptrace."""

    pid: Pid
    tgid: int
    """Its pid as it sees itself: the innermost of its pid namespaces."""
    tasks: dict[Tid, Task]
    frozen_at_s: float
    """CLOCK_MONOTONIC when the first thread was asked to stop."""
    stopped_at_s: float = 0.0
    """When the last one had stopped."""
    thawed_at_s: float = 0.0
    sleeps: dict[Tid, Sleep] = attrs.field(factory=dict)
    """Of the threads that slept in a call with a relative timeout: for how long."""

    @property
    def leader(self) -> Task:
        """The thread whose tid is the pid."""
        return self.tasks[Tid(self.pid)]

    @property
    def freeze_ms(self) -> float:
        """How long the target stood still; 0 while it does."""
        return max(0.0, self.thawed_at_s - self.frozen_at_s) * 1000


@contextlib.contextmanager
def freeze(
    pid: Pid, options: ptrace.Option, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Iterator[Frozen]:
    """Stop all threads of `pid` for the length of the block.

    Raises:
        TargetGone: the process does not exist or ends while it is being stopped.
        TargetRefused: see `tree.refuse_untouchable`.
        FreezeTimeout: a thread is in an uninterruptible wait; all others were let go.
        NotPermitted: we may not trace it.
    """
    refuse_untouchable(pid)
    ns_pid = status.read_status(pid).ns_pid
    asleep = sleeping.look(pid)
    frozen = Frozen(pid, ns_pid[-1], {}, time.monotonic())
    try:
        _stop_all(frozen, options, timeout_s)
        frozen.stopped_at_s = time.monotonic()
        frozen.sleeps = sleeping.confirm(pid, asleep, frozen.tasks, frozen.frozen_at_s)
        yield frozen
    finally:
        thaw(frozen)


def _stop_all(frozen: Frozen, options: ptrace.Option, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    # A first thread that has ended stays in the list as long as there are others.
    seen: set[Tid] = set()
    while new := [tid for tid in list_tids(frozen.pid) if tid not in seen]:
        seen.update(new)
        asked = [tid for tid in new if _ask_to_stop(frozen, tid, options)]
        for tid in asked:
            task = frozen.tasks[tid]
            if not _wait_until_stopped(task, deadline_s, timeout_s):
                del frozen.tasks[tid]
    if Tid(frozen.pid) not in frozen.tasks:
        if frozen.tasks:
            raise TargetRefused(
                frozen.pid, "has lost its first thread: such a process is not supported yet"
            )
        raise TargetGone(frozen.pid)
    for task in frozen.tasks.values():
        task.read_state()


def _ask_to_stop(frozen: Frozen, tid: Tid, options: ptrace.Option) -> bool:
    try:
        ptrace.seize(tid, options)
        frozen.tasks[tid] = Task(tid)
        ptrace.interrupt(tid)
    except TargetGone:
        frozen.tasks.pop(tid, None)
        return False
    except NotPermitted:
        # The answer of the kernel also for a thread that is about to vanish.
        if _has_ended(frozen.pid, tid):
            return False
        raise
    return True


def _has_ended(pid: Pid, tid: Tid) -> bool:
    try:
        return read_task_stat(pid, tid).state in "XZ"
    except TargetGone:
        return True


def _wait_until_stopped(task: Task, deadline_s: float, timeout_s: float) -> bool:
    """Wait for the stop; False if the thread ended instead."""
    spin_until_s = time.monotonic() + _SPIN_S
    while True:
        stop = ptrace.wait(task.tid, block=False)
        if stop is None:
            now_s = time.monotonic()
            if now_s > deadline_s:
                raise FreezeTimeout(task.tid, timeout_s)
            if now_s > spin_until_s:
                time.sleep(_NAP_S)
            else:
                os.sched_yield()
        elif stop.gone:
            return False
        elif stop.kind is ptrace.Kind.INTERRUPTED:
            return True
        elif stop.kind is ptrace.Kind.GROUP_STOP:
            task.group_stopped = stop.sig
            return True
        else:
            # The signal was out of the queue already: it takes effect first, then we stop it.
            ptrace.cont(task.tid, stop.sig)


def thaw(frozen: Frozen) -> None:
    """Give every thread its own state back and let it go; never raises for a thread that ended."""
    if any(task.deferred_stop for task in frozen.tasks.values()):
        # While they are still stopped: none runs another instruction before it stops for that.
        with contextlib.suppress(ProcessLookupError):
            os.kill(frozen.pid, _SIGSTOP)
    for task in frozen.tasks.values():
        with contextlib.suppress(TargetGone):
            _mend(frozen, task)
            task.put_back()
            ptrace.detach(task.tid)
    frozen.thawed_at_s = time.monotonic()


def _mend(frozen: Frozen, task: Task) -> None:
    now_s = time.monotonic()
    interrupted.mend(
        task,
        frozen.sleeps.get(task.tid),
        since_asked_ns=int((now_s - frozen.frozen_at_s) * NS_PER_S),
        since_stopped_ns=int((now_s - frozen.stopped_at_s) * NS_PER_S),
    )


def forget(frozen: Frozen) -> None:
    """Drop the tasks without letting them go: they have been killed."""
    frozen.tasks.clear()
