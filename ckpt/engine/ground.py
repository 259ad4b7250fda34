"""What is there of a tree under construction while its original still runs elsewhere.

    offer       embryos of all who were there then, in their sessions; with room for their memory
    rounds      memory is filled as it comes (`prefilling`)
    at last     who has ended: its embryo ends too, and is reaped by its parent
                who has come: born then, from a parent that is complete
                who stands elsewhere than he did (another parent, say): made anew there, with the
                memory of the one that was made ahead

All embryos share one table of descriptors until the root has taken what they inherit. Who shares
memory or anything else with another process is not made ahead, nor who must be born into a session
whose leader has a terminal to take first (`growing`). Neighbour: `standing` goes on from here.
"""

import contextlib
import fcntl
import os
import resource
from collections.abc import Collection, Iterator, Mapping

import attrs

from ckpt.engine.family import Family, family_of
from ckpt.engine.growing import Growing, reap
from ckpt.engine.layout import choose_arena, spans_of
from ckpt.engine.prefilling import Prefilled, prefilled
from ckpt.engine.records import TreeImage
from ckpt.errors import RestoreFailed
from ckpt.kernel.arch import NR
from ckpt.kernel.clone3 import CloneFlag
from ckpt.kernel.features import Features
from ckpt.kernel.pidfd import pidfd_open
from ckpt.process.remote import call
from ckpt.process.seed import ClockOffsets, Embryo, Nursery, plant
from ckpt.resources.registry import highest_fd, stays_in_ours
from ckpt.tracker.spans import Spans, intersect, join
from ckpt.units import AddrRange, Fd, Pid

_US_AT = Fd(3)
"""Where the embryos have a pidfd of ours: they take what they inherit from us by that, at last."""


@attrs.frozen(repr=False)
class Changes:
    """What has become of processes that were made ahead."""

    ended: tuple[Pid, ...]
    """Each before its parent."""
    moved: tuple[Pid, ...]
    """Those that must be made anew; each before its parent."""


def plan_changes(then: Family, now: Family, made: Collection[Pid]) -> Changes:
    """Return who of those that were made ahead is not what he must be. Pure.

    Args:
        then: as they were made.
        now: as they must be.
        made: those made ahead, each behind its parent; the root among them.
    """
    ended: list[Pid] = []
    moved: list[Pid] = []
    for pid in made:
        if pid not in now.places:
            ended.append(pid)
        elif pid != now.root and (then.places[pid].parent in moved or _has_moved(then, now, pid)):
            moved.append(pid)
    return Changes(tuple(reversed(ended)), tuple(reversed(moved)))


def _has_moved(then: Family, now: Family, pid: Pid) -> bool:
    old, new = then.places[pid], now.places[pid]
    if (old.parent, old.exit_signal) != (new.parent, new.exit_signal) or pid in now.shares:
        return True
    # Whoever leads one now can leave the one that it was born into.
    return old.session != new.session and not now.leads_session(pid)


@attrs.define(repr=False)
class Ground:
    """Embryos that were made ahead."""

    nursery: Nursery
    arena: AddrRange
    prefilled: dict[Pid, Prefilled]
    _family: Family

    def highest_on_the_way(self, n_fds: int) -> int:
        """Return which number is the highest that so many descriptors have before they are placed.

        They come to the lowest that are free; what they are moved to must lie above.
        """
        return n_fds + int(_US_AT)

    def begin(self, tree: TreeImage, fds: Mapping[Fd, Fd], wanted: Mapping[Pid, Spans]) -> None:
        """Have the embryos take descriptors of ours, that they could not be born with.

        State:  only those are left of them that are what they must be; `prefilled` has the memory
                of others too, that are to be born.

        Args:
            tree: all of it, as it must be.
            fds: number there -> descriptor here.
            wanted: the pages of each process, as they must be.

        Raises:
            RestoreFailed: the tree cannot be built on this; or the kernel refused something.
        """
        root = self.nursery.root
        spans = [(v.start, v.end) for p in tree.processes for v in p.resources["memory"].vmas]
        taken = intersect(join(spans), [(int(self.arena.start), int(self.arena.end))])
        if tree.root.pid != root.number or taken:
            raise RestoreFailed("going on from what was prepared", "the tree has become another")
        self._follow(family_of(tree), wanted)
        step = "taking over descriptors"
        asked = [call(NR.pidfd_getfd, _US_AT, here, 0) for here in fds.values()]
        replies = root.run_checked(step, asked)
        moves = []
        for there, reply in zip(fds, replies, strict=True):
            moves.append(call(NR.dup3, reply.value, there, 0))
            moves.append(call(NR.close, reply.value))
        root.run_checked(step, [*moves, call(NR.close, _US_AT)])
        for pid, embryo in self.nursery.embryos.items():
            if pid != root.number:
                embryo.run_checked(step, [call(NR.unshare, CloneFlag.FILES)])

    def _follow(self, now: Family, wanted: Mapping[Pid, Spans]) -> None:
        changes = plan_changes(self._family, now, list(self.nursery.embryos))
        self.prefilled = {pid: one for pid, one in self.prefilled.items() if pid in wanted}
        for pid in changes.moved:
            if pid in self.prefilled:
                self.prefilled[pid].move_out(wanted[pid])
        gone = {*changes.ended, *changes.moved}
        for pid in reversed(list(self.nursery.embryos)):
            if pid in gone:
                place = self._family.places[pid]
                parent = self.nursery.embryos[place.parent]
                self.nursery.end(pid)
                reap(parent, pid, place.exit_signal)


def _likely_fds(tree: TreeImage) -> int:
    """Return how many descriptors there may be at last, ours of the same files and those to be.

    A table that threads share grows only when all processors have seen that (20 ms in the kernel,
    `expand_fdtable`): ours and the embryos' are as wide as they will be before the tree stands
    still.
    """
    n_there = sum(highest_fd([process.resources]) + 1 for process in tree.processes)
    return min(2 * n_there + _ROOM_FDS, _MOST_FDS)


_ROOM_FDS, _MOST_FDS = 256, 1 << 16


def _widen(embryo: Embryo, n_fds: int) -> None:
    """Have an embryo's table hold so many; that it cannot is no failure."""
    reply = embryo.run([call(NR.fcntl, _US_AT, fcntl.F_DUPFD_CLOEXEC, n_fds - 1)])[0]
    if reply.ok:
        embryo.run([call(NR.close, reply.value)])


@contextlib.contextmanager
def prepared(
    tree: TreeImage, features: Features, offsets: ClockOffsets | None
) -> Iterator[Ground | None]:
    """Make embryos ahead, with room for their memory; None where that cannot be.

    Args:
        tree: as it was when it was looked at.
        features: of this kernel.
        offsets: see `plant`.

    Raises:
        PidTaken: a number is in use.
        RestoreFailed: the kernel refused something.
    """
    if not stays_in_ours(tree.root.resources):
        yield None
        return
    vmas = [vma for one in tree.processes for vma in one.resources["memory"].vmas]
    arena_at = choose_arena(spans_of(vma.span for vma in vmas))
    # Its numbers for what it inherits will lie above those that the tree has, however many.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    n_fds = min(hard, _likely_fds(tree))
    us = pidfd_open(Pid(os.getpid()))
    try:
        with contextlib.suppress(OSError):
            os.close(fcntl.fcntl(us, fcntl.F_DUPFD_CLOEXEC, n_fds - 1))
        with plant(tree.root.pid, {_US_AT: us}, offsets, arena_at) as nursery:
            _widen(nursery.root, n_fds)
            growing = Growing(tree, nursery)
            growing.grow_ahead()
            # Whoever was born later would have a copy of all.
            rooms = {
                one.pid: prefilled(nursery.embryos[one.pid], one.resources["memory"], features)
                for one in tree.processes
                if one.pid in nursery.embryos
            }
            yield Ground(nursery, arena_at, rooms, growing.family)
    finally:
        os.close(us)
