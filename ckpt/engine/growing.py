"""Making the processes of a tree, each by its parent, in sessions and groups as they were.

    root            its memory, then its children (`family` has the order), setsid among them
     ├ child        the same
     │  └ ...
     └ zombie       born, put into its session and group, ended as it ended

A child is made when its parent has its memory, keeps what is its own too, and replaces the rest; or
ahead of that (`grow_ahead`), and has nothing of it. Groups come last, when all their members exist.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import attrs

from ckpt.engine.family import Family, family_of
from ckpt.engine.records import ProcessImage, TreeImage, ZombieImage
from ckpt.errors import RestoreFailed, TargetGone
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.clone3 import CloneFlag
from ckpt.kernel.prctl import Prctl
from ckpt.process.remote import Call, In, call
from ckpt.process.seed import Embryo, Nursery, see_off
from ckpt.process.task import ALL_SIGNALS
from ckpt.process.tree import has_ended, is_zombie
from ckpt.resources.registry import takes_terminal
from ckpt.units import Pid

_NAP_S = 0.0002
_END_S = 5.0
_WALL = 0x4000_0000
_NOTHING = CloneFlag(0)


@attrs.define(repr=False)
class Growing:
    """The processes of a tree under construction."""

    tree: TreeImage
    nursery: Nursery
    family: Family = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """See who belongs where."""
        self.family = family_of(self.tree)

    def grow_ahead(self) -> None:
        """Make those for whom it is enough to know who they are; the root's embryo is there.

        They share their descriptors, and have no memory yet.

        Raises:
            PidTaken: a number is in use.
            RestoreFailed: the kernel refused something.
        """
        for process in self.tree.processes:
            if process.pid in self.nursery.embryos:
                self._bear_ahead(process)

    def _bear_ahead(self, process: ProcessImage) -> None:
        embryo = self.nursery.embryos[process.pid]
        births = self.family.births(process.pid)
        if not self._bear_those_alone(embryo, births.before_leaving):
            # Whoever is missing must be born before it leaves.
            return
        if self.family.leads_session(process.pid):
            if takes_terminal(process.resources):
                return
            _leave(embryo)
        self._bear_those_alone(embryo, births.after)

    def _bear_those_alone(self, parent: Embryo, pids: Sequence[Pid]) -> bool:
        """Make those that share nothing; tell whether that was all."""
        alone = [pid for pid in pids if pid not in self.family.shares]
        for pid in alone:
            self._bear(parent, pid, CloneFlag.FILES)
        return len(alone) == len(pids)

    def grow(
        self,
        give_memory: Callable[[Sequence[tuple[ProcessImage, Embryo]]], None],
        give_terminal: Callable[[ProcessImage], None],
    ) -> None:
        """Make everybody who is not there; the root's embryo is.

        Args:
            give_memory: called of all who are there and whose parents have theirs, at once, before
                they bear anybody.
            give_terminal: called of the leader of a session that has no other members yet.

        Raises:
            PidTaken: a number is in use.
            RestoreFailed: the kernel refused something.
        """
        waiting = list(self.tree.processes)
        while waiting:
            embryos = self.nursery.embryos
            # Each stands behind its parent, who has made it when its turn comes.
            born = [
                (process, embryos[process.pid]) for process in waiting if process.pid in embryos
            ]
            waiting = [process for process in waiting if process.pid not in embryos]
            give_memory(born)
            for process, embryo in born:
                births = self.family.births(process.pid)
                self._bear_missing(embryo, births.before_leaving, before=True)
                if self.family.leads_session(process.pid):
                    _leave(embryo)
                    give_terminal(process)
                self._bear_missing(embryo, births.after)
        for zombie in self.tree.zombies:
            if self.family.leads_session(zombie.pid):
                _leave(self.nursery.embryos[zombie.pid])
        self._make_groups()
        for zombie in self.tree.zombies:
            self._end(zombie)

    def _bear_missing(self, parent: Embryo, pids: Sequence[Pid], *, before: bool = False) -> None:
        for pid in pids:
            if pid in self.nursery.embryos:
                continue
            if before and parent.leads_session:
                raise RestoreFailed(f"making process {pid}", "its parent has left its session")
            self._bear(parent, pid)

    def _bear(self, parent: Embryo, pid: Pid, flags: CloneFlag = _NOTHING) -> None:
        exit_signal = max(self.family.places[pid].exit_signal, 0)
        maker = self.family.find_maker(pid)
        if maker is None:
            raise RestoreFailed(
                f"making process {pid}", "nobody could share with it what it shared"
            )
        if maker != parent.number:
            # The kernel gives it the exit signal of its maker.
            parent, exit_signal, flags = self.nursery.embryos[maker], 0, flags | CloneFlag.PARENT
        if pid in self.family.shares:
            flags |= self.family.shares[pid].flags()
        self.nursery.bear(parent, pid, exit_signal, flags)

    def _make_groups(self) -> None:
        with self._helpers():
            for pid, group in self.family.iter_joins():
                embryo = self.nursery.embryos[pid]
                if group is None:
                    _join_ours(embryo)
                    continue
                embryo.run_checked("joining a process group", [call(NR.setpgid, 0, group)])

    @contextlib.contextmanager
    def _helpers(self) -> Iterator[None]:
        """Let a process of its number lead a group whose leader has ended, until it is joined."""
        made: list[tuple[Embryo, Pid]] = []
        for group, member in self.family.groups_without_leader().items():
            parent = self.nursery.embryos[member]
            helper = self.nursery.bear(parent, group, 0)
            made.append((parent, group))
            helper.run_checked("making a process group", [call(NR.setpgid, 0, 0)])
        yield
        for parent, group in made:
            self.nursery.end(group)
            reap(parent, group, 0)

    def _end(self, zombie: ZombieImage) -> None:
        """Let a process end as the image says, and its parent not be told a second time."""
        embryo = self.nursery.embryos[zombie.pid]
        embryo.run([_set_name(zombie.comm)])
        killed_by = zombie.wait_status & 0x7F
        if killed_by:
            # No core file of ours; that there was one once, its parent will not be told.
            embryo.run([call(NR.prlimit64, 0, _RLIMIT_CORE, In(bytes(16)), 0)])
            _die(embryo, killed_by)
        else:
            _exit(embryo, NR.exit_group, zombie.wait_status >> 8 & 0xFF, 0)
        _wait_until(lambda: is_zombie(embryo.pid), embryo.pid)
        # Until here it is one of those that a failure ends.
        del self.nursery.embryos[zombie.pid]
        parent = self.nursery.embryos[zombie.place.parent]
        sig = zombie.place.exit_signal
        if sig > 0:
            parent.run([_take_signal(sig)])


def reap(parent: Embryo, pid: Pid, exit_signal: int) -> None:
    """Have its parent wait for a child of its that has ended, and not be told by a signal too."""
    parent.run_checked("reaping a process", [call(NR.wait4, pid, 0, _WALL, 0)])
    if exit_signal > 0:
        parent.run([_take_signal(exit_signal)])


def _leave(embryo: Embryo) -> None:
    """Let it make a session of its own, if it has not."""
    if not embryo.leads_session:
        embryo.run_checked("making a session", [call(NR.setsid)])
        embryo.leads_session = True


def end_leader(image: ProcessImage, embryo: Embryo) -> None:
    """Let the first thread of a process end, if it had, while the others stand.

    From then on the oldest of them stands for it (`tree.reachable_as`).
    """
    ended = image.ended_leader
    if ended is None:
        return
    embryo.run([_set_name(ended.comm)])
    leader = embryo.leader
    # What is queued for the process is for the others.
    _exit(embryo, NR.exit, ended.wait_status >> 8 & 0xFF, ALL_SIGNALS)
    _wait_until(lambda: has_ended(embryo.pid), embryo.pid)
    del embryo.tasks[leader.inner]
    other = embryo.leader = min(embryo.tasks.values(), key=lambda task: task.tid)
    other.deferred_stop |= leader.deferred_stop
    embryo.arena.pid = Pid(other.tid)


def _set_name(comm: str) -> Call:
    return call(NR.prctl, Prctl.SET_NAME, In(comm.encode(errors="surrogateescape")[:15] + b"\0"))


_RLIMIT_CORE = 4


def _join_ours(embryo: Embryo) -> None:
    """Let a process that has made a group of its own come back into that of the restorer.

    Raises:
        RestoreFailed: it is in a pid namespace in which that has no number.
    """
    try:
        if embryo.pid == embryo.number:
            embryo.run_checked("joining a process group", [call(NR.setpgid, 0, os.getpgrp())])
        else:
            os.setpgid(embryo.pid, os.getpgrp())
    except OSError as error:
        reason = "a process was in that of whoever restores, which has no number among --new-pids"
        raise RestoreFailed("joining a process group", reason) from error


def _take_signal(sig: int) -> Call:
    """Return the call that takes a pending signal off the queue, if it is there."""
    mask = (1 << (sig - 1)).to_bytes(8, "little")
    return call(NR.rt_sigtimedwait, In(mask), 0, In(bytes(16)), 8)


def _die(embryo: Embryo, sig: int) -> None:
    """Let it be killed by a signal, as it was."""
    task = embryo.leader
    task.disturbed = True
    task.put_back()
    with contextlib.suppress(ProcessLookupError, TargetGone):
        os.kill(embryo.pid, sig)
        if sig == signal.SIGKILL:
            see_off(task.tid)
        else:
            ptrace.detach(task.tid)


def _exit(embryo: Embryo, nr: NR, code: int, blocked: int) -> None:
    """Let it exit with a code, as it did, by a call that does not return."""
    task, arena = embryo.leader, embryo.arena
    exiting = arch.single_call_registers(task.registers, arena.insn, nr, (code,))
    task.prepare_to_run(exiting, blocked)
    with contextlib.suppress(TargetGone):
        ptrace.detach(task.tid)


def _wait_until(holds: Callable[[], bool], pid: Pid) -> None:
    give_up_s = time.monotonic() + _END_S
    while not holds():
        if time.monotonic() > give_up_s:
            raise RestoreFailed(f"ending process {pid}", "it still runs")
        time.sleep(_NAP_S)
