"""Sessions and process groups of a tree: in which order processes must be born into them. Pure.

A process gets the session of its parent at its birth, and can leave it only for one of its own:

    parent 10, session 5   ── fork ──> 11, session 5       before 10 leaves
             setsid(), session 10
                           ── fork ──> 12, session 10      after it has left

A group it can join at any time, if that is of its session and still has a member. The number of a
group whose leader has ended is taken, for a moment, by a helper that makes the group.

The session and the group of the root, if nobody of the tree leads them, stand for those of whoever
restores; so does any other group that a process outside leads.

Who shares what with whom (`process/clones`) is made by somebody who has that, with clone's flags.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from functools import cached_property

import attrs

from ckpt.engine.records import OUTER_GROUP, Place, ProcessImage, TreeImage, ZombieImage
from ckpt.errors import Finding, UnsupportedState
from ckpt.process.clones import OWN, Common, Shares
from ckpt.units import Pid


@attrs.frozen(repr=False)
class Births:
    """The children of one process, in the order in which they are made."""

    before_leaving: tuple[Pid, ...]
    """Those that keep the session that their parent was born into."""
    after: tuple[Pid, ...]


def _in_order_of_leaving(leaving: Mapping[Pid, Pid | None]) -> Iterator[Pid]:
    """Yield who leaves the group that has its number, for which: first those that nobody joins.

    A group that somebody still wants to join must not be left by its last member.
    """
    wanted = Counter(leaving.values())
    left = dict.fromkeys(leaving)
    ready = deque(pid for pid in leaving if not wanted[pid])
    while left:
        first = ready.popleft() if ready else next(iter(left))
        del left[first]
        group = leaving[first]
        wanted[group] -= 1
        if group in left and not wanted[group]:
            ready.append(group)
        yield first


@attrs.frozen(repr=False, slots=False)
class Family:
    """Who stands where; those included that have ended and were not waited for."""

    root: Pid
    places: Mapping[Pid, Place]
    """Each behind its parent."""
    shares: Mapping[Pid, Shares] = attrs.Factory(dict)
    """Of those that have something of another one."""

    def births(self, parent: Pid) -> Births:
        """Return the children of a process."""
        before: list[Pid] = []
        after: list[Pid] = []
        for pid in self._children.get(parent, []):
            stays = self.leads_session(parent) and self._native.get(pid, parent) != parent
            (before if stays else after).append(pid)
        return Births(tuple(before), tuple(after))

    def find_maker(self, pid: Pid) -> Pid | None:
        """Return who can make a process that shares what it shares; None if nobody can.

        That is its parent; or a child of that which is made before it, and makes it a child of
        their parent (CLONE_PARENT), with its own exit signal.
        """
        place, shared = self.places[pid], self.shares.get(pid, OWN).items()
        if all(self._has(place.parent, common, owner) for common, owner in shared):
            return place.parent
        births = self.births(place.parent)
        siblings = births.after if pid in births.after else births.before_leaving
        for other in siblings[: siblings.index(pid)]:
            if self.places[other].exit_signal == place.exit_signal and all(
                self._has(other, common, owner) for common, owner in shared
            ):
                return other
        return None

    def _has(self, pid: Pid, common: Common, owner: Pid) -> bool:
        return owner in (pid, self.shares.get(pid, OWN).of(common))

    @cached_property
    def _children(self) -> dict[Pid, list[Pid]]:
        children: dict[Pid, list[Pid]] = {}
        for pid, place in self.places.items():
            if pid != self.root:
                children.setdefault(place.parent, []).append(pid)
        return children

    @cached_property
    def _native(self) -> dict[Pid, Pid]:
        """The session that a process must be born into, where that matters.

        For whoever leads one, it matters to those of its children that stay in the older one.
        """
        native: dict[Pid, Pid] = {}
        for pid in reversed(list(self.places)):
            if not self.leads_session(pid):
                native[pid] = self.places[pid].session
                continue
            for child in self._children.get(pid, []):
                if native.get(child, pid) != pid:
                    native[pid] = native[child]
        return native

    def leads_session(self, pid: Pid) -> bool:
        """Tell whether a process leads its session."""
        return self.places[pid].session == pid

    def iter_joins(self) -> Iterator[tuple[Pid, Pid | None]]:
        """Yield who joins which group, each when that is there; None: that of the restorer.

        Who has left the group that has its number, while others are in it, makes it and leaves it.
        """
        groups = {
            pid: None if self.is_outside(place) else place.group
            for pid, place in self.places.items()
            if not self.leads_session(pid)
        }
        joined = set(groups.values())
        makers = dict.fromkeys(pid for pid in groups if pid in joined)
        yield from ((pid, pid) for pid in makers)
        for pid, group in groups.items():
            if pid not in makers and group is not None:
                yield pid, group
        leaving = {pid: groups[pid] for pid in makers if groups[pid] != pid}
        for pid in _in_order_of_leaving(leaving):
            yield pid, leaving[pid]

    def is_outside(self, place: Place) -> bool:
        """Tell whether a place is in the group of whoever restores."""
        outer = self.places[self.root].group
        return place.group == OUTER_GROUP or (place.group == outer and outer not in self.places)

    def groups_without_leader(self) -> dict[Pid, Pid]:
        """Return the groups that a helper must make -> somebody of the session."""
        found: dict[Pid, Pid] = {}
        for pid, place in self.places.items():
            if place.group not in self.places and not self.is_outside(place):
                found.setdefault(place.group, pid)
        return found

    def iter_findings(self) -> Iterator[Finding]:
        """Yield who cannot be made again as it was, and why."""
        for pid, problem in (*self._iter_lost(), *self._iter_unmakeable()):
            yield Finding(f"process {pid}", problem)

    def _iter_unmakeable(self) -> Iterator[tuple[Pid, str]]:
        for pid, shares in self.shares.items():
            if pid in self.places and self.find_maker(pid) is None:
                spoken = " and ".join(
                    f"its {common.value} with process {owner}" for common, owner in shares.items()
                )
                yield (
                    pid,
                    f"shares {spoken}, and no process could make such a child of"
                    f" {self.places[pid].parent}, which is not supported",
                )

    def _iter_lost(self) -> Iterator[tuple[Pid, str]]:
        for pid, session in self._native.items():
            parent = self.places[pid].parent
            if pid == self.root:
                continue
            older = self._native.get(parent, session)
            if parent == self.root and older in self.places:
                # The root was born into a session of nobody in its tree.
                older = self.places[parent].session
            if session not in (self.places[parent].session, older):
                yield (
                    pid,
                    f"comes from session {session}, and its parent {parent} does not (it was given"
                    " to that when its own parent ended), which is not supported yet",
                )


def family_of(tree: TreeImage) -> Family:
    """Return who stands where in an image."""
    places = {process.pid: process.place for process in tree.processes}
    return Family(
        tree.root.pid,
        places | {zombie.pid: zombie.place for zombie in tree.zombies},
        {process.pid: process.shares for process in tree.processes if process.shares != OWN},
    )


def refuse_unplannable(
    processes: tuple[ProcessImage, ...], zombies: tuple[ZombieImage, ...]
) -> None:
    """Refuse a frozen tree whose processes could not be made again as they were.

    Raises:
        UnsupportedState: with everyone who could not.
    """
    tree = TreeImage(processes, zombies)
    findings = tuple(family_of(tree).iter_findings())
    if findings:
        raise UnsupportedState(tree.root.pid, findings)
