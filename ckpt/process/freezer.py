"""Stop a tree of processes, all their threads, and let it go on as if nothing had been.

    with freeze_tree(root, options) as tree:
        ...                              every thread of every process is in a ptrace stop
                                         thawed here, whatever happened

New threads that appear while we stop the others are found by listing again until nothing is new,
and so are new processes. A thread in group-stop stays in it; a signal that was already taken from
the queue is delivered before the thread stops.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

from ckpt.errors import FreezeTimeout, NotPermitted, TargetError, TargetGone, TargetRefused
from ckpt.kernel import ptrace
from ckpt.kernel.procfs import status
from ckpt.kernel.procfs.files import decode
from ckpt.kernel.procfs.stat import Stat, parse_stat, read_stat, read_task_stat
from ckpt.kernel.ptrace_burst import PtraceBurst, StopBurst
from ckpt.process import gadgets, interrupted, sleeping
from ckpt.process.sleeping import Asleep, Sleep
from ckpt.process.task import StateReading, Task, look_at
from ckpt.process.timeouts import NS_PER_S
from ckpt.process.tree import (
    Children,
    ending_told,
    has_ended,
    is_zombie,
    list_tids,
    list_tree,
    reachable_as,
    refuse_untouchable,
)
from ckpt.process.uninterrupted import uninterrupted
from ckpt.units import Pid, Tid

_SIGSTOP = 19
_STOPPED = "tT"
_SPIN_S = 0.0005
_NAP_S = 0.0002
_REGAIN_S = 1.0
DEFAULT_TIMEOUT_S = 10.0


@attrs.define(slots=True, eq=False, repr=False)
class Frozen:
    """A process of which every thread is stopped under our ptrace."""

    pid: Pid
    """By which it can be asked about, see `tree.reachable_as`."""
    number: Pid
    """Its pid."""
    tgid: int
    """That as it sees itself: the innermost of its pid namespaces."""
    is_our_child: bool
    asleep: Mapping[Tid, Asleep]
    """Its threads that slept in a call with a relative timeout, just before the stop."""
    children: Children
    prepared: "_Prepared"
    """What its threads are asked, laid out before the stop."""
    is_nested: bool = False
    """It is in a pid namespace below ours, and its numbers there are others."""
    tasks: dict[Tid, Task] = attrs.field(factory=dict)
    frozen_at_s: float = 0.0
    """CLOCK_MONOTONIC when the first thread was asked to stop."""
    stopped_at_s: float = 0.0
    """When the last one had stopped."""
    thawed_at_s: float = 0.0
    sleeps: dict[Tid, Sleep] = attrs.field(factory=dict)
    """For how long these threads had slept."""
    texts: dict[str, bytes] = attrs.field(factory=dict)
    """Files below /proc/PID, by name, that were read when all had stopped, for whoever asks."""
    _stat: Stat | None = None

    @property
    def leader(self) -> Task:
        """The first thread; the oldest one, if that has ended."""
        return self.tasks[Tid(self.pid)]

    @property
    def stat(self) -> Stat:
        """Its /proc/PID/stat, read once.

        Raises:
            TargetGone: the process ended.
        """
        if self._stat is None:
            text = self.texts.get("stat")
            self._stat = read_stat(self.pid) if text is None else parse_stat(decode(text))
        return self._stat

    @property
    def freeze_ms(self) -> float:
        """How long the target stood still; 0 while it does."""
        return max(0.0, self.thawed_at_s - self.frozen_at_s) * 1000


@attrs.define(slots=True, eq=False, repr=False)
class FrozenTree:
    """A process and all its descendants, stopped together."""

    root: Pid
    processes: dict[Pid, Frozen]
    """Those that live; the root first, each behind its parent."""
    parents: dict[Pid, Pid]
    """Child -> parent, of all but the root; of those too that have ended (zombies)."""
    options: ptrace.Option = ptrace.Option.NONE
    """With which all threads are traced."""
    frozen_at_s: float = 0.0
    thawed_at_s: float = 0.0

    @property
    def zombies(self) -> list[Pid]:
        """Those that have ended and were not waited for yet."""
        return [pid for pid in self.parents if pid not in self.processes]

    @property
    def freeze_ms(self) -> float:
        """From the first thread stopped to the last one running again; 0 while they stand."""
        return max(0.0, self.thawed_at_s - self.frozen_at_s) * 1000


@contextlib.contextmanager
def freeze_tree(
    root: Pid, options: ptrace.Option, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Iterator[FrozenTree]:
    """Stop all threads of `root` and of all its descendants for the length of the block.

    Raises:
        TargetGone: the root does not exist, or one of them ends while they are being stopped (a
            descendant that has ended before counts as a zombie of its parent).
        TargetRefused: see `tree.refuse_untouchable`, of any of them.
        FreezeTimeout: a thread is in an uninterruptible wait; all others were let go.
        NotPermitted: we may not trace one of them.
    """
    refuse_untouchable(root)
    prepared = dict(_iter_prepared(root, list_tree(root), options))
    tree = FrozenTree(root, {}, {}, options, time.monotonic())
    try:
        # A thread that is stopped ends only together with all others.
        with ending_told(tree.processes):
            _stop_tree(tree, prepared, options, timeout_s)
            yield tree
    finally:
        thaw(tree.processes.values())
        tree.thawed_at_s = time.monotonic()


@contextlib.contextmanager
def freeze(
    pid: Pid, options: ptrace.Option, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Iterator[Frozen]:
    """Stop all threads of `pid`, but no other process, for the length of the block.

    Raises:
        TargetError, HostError: as `freeze_tree`.
    """
    refuse_untouchable(pid)
    frozen = _prepare(pid, options)
    try:
        with ending_told([pid]):
            if _stop([frozen], timeout_s):
                raise TargetGone(pid)
            yield frozen
    finally:
        thaw([frozen])


def _prepare(pid: Pid, options: ptrace.Option) -> Frozen:
    """Read everything that can be read before the stop."""
    gadgets.learn(pid)
    ids = status.read_status(pid)
    is_our_child = read_stat(pid).ppid == os.getpid()
    prepared, children = _Prepared(list_tids(pid), options), Children(pid)
    asleep, (*outer, own) = sleeping.look(pid), ids.ns_tgid
    return Frozen(pid, ids.tgid, own, is_our_child, asleep, children, prepared, bool(outer))


def _iter_prepared(
    root: Pid, pids: Iterable[Pid], options: ptrace.Option
) -> Iterator[tuple[Pid, Frozen]]:
    for pid in pids:
        try:
            if pid != root:
                refuse_untouchable(pid)
            yield pid, _prepare(pid, options)
        except TargetError:
            # A descendant may end at any time.
            if pid == root or not is_zombie(pid):
                raise


def _stop_tree(
    tree: FrozenTree, prepared: dict[Pid, Frozen], options: ptrace.Option, timeout_s: float
) -> None:
    """Stop the processes that are known, then those that they have made meanwhile."""
    new = prepared
    stopped: dict[Pid, Frozen] = {}
    while new:
        stopped |= new
        # From here on they are let go if anything fails.
        tree.processes |= new
        for pid in _stop(list(new.values()), timeout_s):
            if pid == tree.root:
                raise TargetGone(pid)
            stopped.pop(pid).children.close()
            del tree.processes[pid]
        tree.parents = _relate(tree.root, stopped)
        born = [child for child in tree.parents if child not in stopped and not is_zombie(child)]
        new = dict(_iter_prepared(tree.root, born, options))
    # Who is not found any more below the root was given to another parent meanwhile.
    kept = {pid: stopped[pid] for pid in (tree.root, *tree.parents) if pid in stopped}
    lost = [frozen for pid, frozen in stopped.items() if pid not in kept]
    tree.processes = kept
    thaw(lost)


def _relate(root: Pid, stopped: Mapping[Pid, Frozen]) -> dict[Pid, Pid]:
    """Return all descendants with their parents, each behind its parent."""
    parents: dict[Pid, Pid] = {}
    order = [root]
    known = {frozen.number: pid for pid, frozen in stopped.items()}
    for pid in order:
        if pid in stopped:
            numbers = stopped[pid].children.list(stopped[pid].tasks)
            children = [known.get(number) or reachable_as(number) for number in numbers]
            parents |= dict.fromkeys(children, pid)
            order += children
    return parents


class _Prepared:
    """What threads are asked to stop them and to read their states, laid out before the stop."""

    def __init__(self, tids: Sequence[Tid], options: ptrace.Option) -> None:
        # SYSGOOD: if we are killed while it stops in a system call, it would be sent a SIGTRAP.
        self.options = options | ptrace.Option.TRACESYSGOOD
        self.tids = tids
        self._asking = PtraceBurst()
        for tid in tids:
            self._asking.seize(tid, self.options)
            self._asking.interrupt(tid)
        self.stops = StopBurst(tids)
        self.states = StateReading(tids)

    @uninterrupted()  # or nobody would know whom to let go
    def ask_to_stop(self, frozen: Frozen) -> list[Tid]:
        """Ask the threads to stop, all in one go; return those that will."""
        results = self._asking.run()
        asked = []
        for tid, seized, interrupted_too in zip(
            self.tids, results[::2], results[1::2], strict=True
        ):
            if seized == 0:
                frozen.tasks[tid] = Task(tid)
            if seized == interrupted_too == 0 or _ask_alone(frozen, tid, self.options):
                asked.append(tid)
        return asked


def _stop(processes: Sequence[Frozen], timeout_s: float) -> list[Pid]:
    """Stop all threads of these processes; return those that have ended instead."""
    deadline_s = time.monotonic() + timeout_s
    asked = []
    for frozen in processes:
        frozen.frozen_at_s = time.monotonic()
        asked.append((frozen, frozen.prepared.ask_to_stop(frozen)))
    gone = []
    for frozen, stopping in asked:
        try:
            _stop_all(frozen, stopping, _Deadline(deadline_s, timeout_s))
        except TargetGone:
            thaw([frozen])
            gone.append(frozen.pid)
            continue
        frozen.stopped_at_s = time.monotonic()
        frozen.sleeps = sleeping.confirm(
            frozen.pid, frozen.asleep, frozen.tasks, frozen.frozen_at_s
        )
    return gone


@attrs.frozen(slots=True, repr=False)
class _Deadline:
    at_s: float
    timeout_s: float


def _stop_all(frozen: Frozen, asked: Sequence[Tid], deadline: _Deadline) -> None:
    """Wait until all threads stand that were asked to, and stop those that they have made."""
    now = frozen.prepared
    # A first thread that has ended stays in the list as long as there are others.
    seen = set(now.tids)
    while True:
        _wait_for_all(frozen, asked, now.stops, deadline)
        new = [tid for tid in list_tids(frozen.pid) if tid not in seen]
        if not new:
            break
        seen.update(new)
        now = _Prepared(new, now.options)
        asked = now.ask_to_stop(frozen)
    if Tid(frozen.pid) not in frozen.tasks:
        raise _without_leader(frozen)
    frozen.prepared.states.read(frozen.tasks)
    if frozen.is_nested:
        for tid, task in frozen.tasks.items():
            task.inner = Tid(status.read_task_status(frozen.pid, tid).ns_pid[-1])


def _wait_for_all(
    frozen: Frozen, asked: Sequence[Tid], stops: StopBurst, deadline: _Deadline
) -> None:
    """Wait until these threads have stopped; those that end instead are forgotten."""
    stopped: dict[Tid, int] = {}
    spin_until_s = time.monotonic() + _SPIN_S
    while len(stopped) < len(asked) and time.monotonic() < spin_until_s:
        stopped |= stops.take()
        # We may go before the very threads that we wait for (`urgent`).
        os.sched_yield()
    # The leader last: if all are killed, its end is told only after ours of the others is seen.
    for tid in reversed(asked):
        word = stopped.get(tid)
        first = None if word is None else ptrace.parse_wait_status(tid, word)
        if not _wait_until_stopped(frozen, frozen.tasks[tid], first, deadline):
            del frozen.tasks[tid]


def _ask_alone(frozen: Frozen, tid: Tid, options: ptrace.Option) -> bool:
    """Ask a thread that has refused, for the reason; False if it has ended."""
    try:
        ptrace.seize(tid, options)
        frozen.tasks[tid] = Task(tid)
        ptrace.interrupt(tid)
    except TargetGone:
        frozen.tasks.pop(tid, None)
        return False
    except NotPermitted:
        frozen.tasks.pop(tid, None)
        # The answer of the kernel also for a thread that is about to vanish.
        if has_ended(Pid(tid)):
            return False
        raise
    return True


def _state_of(pid: Pid, tid: Tid) -> str:
    """Return the letter of a thread's state, X if it is gone."""
    try:
        return read_task_stat(pid, tid).state
    except TargetGone:
        return "X"


def _without_leader(frozen: Frozen) -> TargetGone | TargetRefused:
    """Return what it means that the first thread has ended: all did, or it alone."""
    others = (tid for tid in frozen.tasks if tid != Tid(frozen.pid))
    if any(_state_of(frozen.pid, tid) in _STOPPED for tid in others):
        return TargetRefused(
            frozen.number, "has lost its first thread just now, and goes on with others: try again"
        )
    return TargetGone(frozen.pid)


def _wait_until_stopped(
    frozen: Frozen, task: Task, stop: ptrace.WaitStatus | None, deadline: _Deadline
) -> bool:
    """Wait for the stop, if `stop` is not it already; False if the thread ended instead."""
    spin_until_s = time.monotonic() + _SPIN_S
    while True:
        stop = stop or _look_at(frozen, task)
        if stop is None:
            now_s = time.monotonic()
            if now_s > deadline.at_s:
                raise FreezeTimeout(task.tid, deadline.timeout_s)
            if now_s > spin_until_s:
                # The end of the first thread is not told before ours of all others is seen.
                if task.tid == Tid(frozen.pid) and has_ended(frozen.pid):
                    raise _without_leader(frozen)
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
            stop = None


def thaw(processes: Iterable[Frozen]) -> None:
    """Give every thread its own state back and let it go; never raises for a thread that ended."""
    with uninterrupted():
        tasks: list[tuple[Frozen, Task]] = []
        for frozen in processes:
            if any(task.deferred_stop for task in frozen.tasks.values()):
                # While they are still stopped: none runs another instruction before it stops.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(frozen.pid, _SIGSTOP)
            # The leader last, see `_stop_all`.
            of_one = sorted(frozen.tasks.values(), key=lambda task: task.tid == Tid(frozen.pid))
            tasks += [(frozen, task) for task in of_one]
        lost = _let_all_go(tasks)
        for frozen in processes:
            frozen.thawed_at_s = time.monotonic()
            frozen.children.close()
        for frozen, task in lost:
            _regain(frozen, task)


def _let_all_go(tasks: Sequence[tuple[Frozen, Task]]) -> list[tuple[Frozen, Task]]:
    """Detach from stopped threads, in one go; return those that do not stand still (any more)."""
    ready = [task for frozen, task in tasks if _make_ready(frozen, task)]
    burst = PtraceBurst()
    for task in ready:
        burst.detach(task.tid)
    gone = {task.tid for task, result in zip(ready, burst.run(), strict=True) if result == 0}
    return [(frozen, task) for frozen, task in tasks if task.tid not in gone]


def _make_ready(frozen: Frozen, task: Task) -> bool:
    """Give a stopped thread its own state back; False if it does not stand still (any more)."""
    try:
        if not task.mended:
            _mend(frozen, task)
            task.mended = True
        task.put_back()
    except TargetGone:
        return False
    return True


def _let_go(frozen: Frozen, task: Task) -> bool:
    """Detach from a stopped thread; False if it does not stand still (any more)."""
    try:
        if not _make_ready(frozen, task):
            return False
        ptrace.detach(task.tid)
    except TargetGone:
        return False
    return True


def _regain(frozen: Frozen, task: Task) -> None:
    """See off a thread that could not be let go, for a moment at most.

    Either it ends: then its parent must be able to wait for it, which our own unseen zombies
    prevent. Or we were interrupted while it ran a batch, and it stops at the end of that. One that
    never stopped at all (see `FreezeTimeout`) is ours until we end.
    """
    give_up_s = time.monotonic() + _REGAIN_S
    while time.monotonic() < give_up_s:
        try:
            stop = _look_at(frozen, task)
        except TargetGone:
            return
        if stop is None:
            time.sleep(_NAP_S)
        elif stop.gone or _let_go(frozen, task):
            return


def _look_at(frozen: Frozen, task: Task) -> ptrace.WaitStatus | None:
    """Return what has become of a thread, None if nothing yet.

    The end of a child of ours is left to be waited for by whoever started it, and wants its status.
    """
    return look_at(task.tid, reap=not frozen.is_our_child or task.tid != Tid(frozen.number))


def _mend(frozen: Frozen, task: Task) -> None:
    now_s = time.monotonic()
    interrupted.mend(
        task,
        frozen.sleeps.get(task.tid),
        since_asked_ns=int((now_s - frozen.frozen_at_s) * NS_PER_S),
        since_stopped_ns=int((now_s - frozen.stopped_at_s) * NS_PER_S),
    )


def forget(frozen: Frozen) -> None:
    """See off all threads after a SIGKILL: none is let go, and their parent can wait for them."""
    for task in sorted(frozen.tasks.values(), key=lambda task: task.tid == Tid(frozen.pid)):
        with contextlib.suppress(TargetGone):
            while not _is_gone(_look_at(frozen, task)):
                time.sleep(_NAP_S)
    frozen.tasks.clear()


def _is_gone(stop: ptrace.WaitStatus | None) -> bool:
    return stop is not None and stop.gone
