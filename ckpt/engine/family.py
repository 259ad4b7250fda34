"""Sessions and process groups of a tree: in which order processes must be born into them. Pure.

A process gets the session of its parent at its birth, and can leave it only for one of its own:

    parent 10, session 5   ── fork ──> 11, session 5       before 10 leaves
             setsid(), session 10
                           ── fork ──> 12, session 10      after it has left

A group it can join at any time, if that is of its session and still has a member. The number of a
group whose leader has ended is taken, for a moment, by a helper that makes the group.

The session and the group of the root, if nobody of the tree leads them, stand for those of whoever
restores.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property

import attrs

from ckpt.engine.records import Place, ProcessImage, TreeImage, ZombieImage
from ckpt.errors import Finding, UnsupportedState
from ckpt.units import Pid


@attrs.frozen(repr=False)
class Births:
    """The children of one process, in the order in which they are made."""

    before_leaving: tuple[Pid, ...]
    """Those that keep the session that their parent was born into."""
    after: tuple[Pid, ...]


@attrs.frozen(repr=False, slots=False)
class Family:
    """Who stands where; those included that have ended and were not waited for."""

    root: Pid
    places: Mapping[Pid, Place]
    """Each behind its parent."""

    def births(self, parent: Pid) -> Births:
        """Return the children of a process."""
        before: list[Pid] = []
        after: list[Pid] = []
        for pid in self._children.get(parent, []):
            stays = self.leads_session(parent) and self._native.get(pid, parent) != parent
            (before if stays else after).append(pid)
        return Births(tuple(before), tuple(after))

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
        makers = [pid for pid in groups if pid in groups.values()]
        yield from ((pid, pid) for pid in makers)
        for pid, group in groups.items():
            if pid not in makers and group is not None:
                yield pid, group
        leaving = [pid for pid in makers if groups[pid] != pid]
        while leaving:
            # A group that somebody still wants to join must not be left by its last member.
            wanted = {groups[pid] for pid in leaving}
            first = next((pid for pid in leaving if pid not in wanted), leaving[0])
            leaving.remove(first)
            yield first, groups[first]

    def is_outside(self, place: Place) -> bool:
        """Tell whether a place is in the group of whoever restores."""
        root = self.places[self.root]
        return place.group == root.group and root.group not in self.places

    def groups_without_leader(self) -> dict[Pid, Pid]:
        """Return the groups that a helper must make -> somebody of the session."""
        found: dict[Pid, Pid] = {}
        for pid, place in self.places.items():
            if place.group not in self.places and not self.is_outside(place):
                found.setdefault(place.group, pid)
        return found

    def iter_problems(self) -> Iterator[tuple[Pid, str]]:
        """Yield who cannot be born into its session again, and why."""
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
    return Family(tree.root.pid, places | {zombie.pid: zombie.place for zombie in tree.zombies})


def refuse_unplannable(
    processes: tuple[ProcessImage, ...], zombies: tuple[ZombieImage, ...]
) -> None:
    """Refuse a frozen tree whose processes could not be born into their sessions again.

    Raises:
        UnsupportedState: with everyone who could not.
    """
    tree = TreeImage(processes, zombies)
    problems = family_of(tree).iter_problems()
    findings = tuple(Finding(f"process {pid}", problem) for pid, problem in problems)
    if findings:
        raise UnsupportedState(tree.root.pid, findings)
