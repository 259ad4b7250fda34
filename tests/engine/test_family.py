"""The plan of a family against a model of fork, setsid, setpgid, exit and wait.

A history makes a tree of processes; the plan is followed in a new one, which must give the same
places. Sessions that nobody of the tree leads are one: that of whoever restores.
"""

import contextlib

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine import records
from ckpt.engine.family import Births, Family
from ckpt.engine.records import Place
from ckpt.process.clones import Shares
from ckpt.units import Pid

OUTER, OUTER_GROUP, ROOT = 5, 6, 10
RESTORER, RESTORER_GROUP = 1005, 1006


@attrs.define
class Member:
    parent: int
    session: int
    group: int
    ended: bool = False


class World:
    """Processes of one kernel; a call that the kernel refuses raises PermissionError."""

    def __init__(self, session, group):
        self.members = {ROOT: Member(0, session, group)}
        self.outer = (session, group)
        self.next_pid = ROOT + 1

    def fork(self, parent, pid=None):
        if pid is None:
            pid, self.next_pid = self.next_pid, self.next_pid + 1
        assert pid not in self.members
        of_parent = self.members[parent]
        self.members[pid] = Member(parent, of_parent.session, of_parent.group)
        return pid

    def setsid(self, pid):
        if any(pid == one.group for one in self.members.values()):
            raise PermissionError
        self.members[pid].session = self.members[pid].group = pid

    def setpgid(self, pid, group):
        me = self.members[pid]
        if me.session == pid:
            raise PermissionError
        members = [one for one in self.members.values() if one.group == group]
        is_outer = (me.session, group) == self.outer
        if group != pid and not is_outer and all(one.session != me.session for one in members):
            raise PermissionError
        me.group = group

    def end(self, pid, *, adopts):
        """End a process; its children are given to the root, or to somebody who is not of us."""
        self.members[pid].ended = True
        for child in [c for c, one in self.members.items() if one.parent == pid]:
            if adopts:
                self.members[child].parent = ROOT
            else:
                self._leave(child)

    def _leave(self, pid):
        for child in [c for c, one in self.members.items() if one.parent == pid]:
            self._leave(child)
        del self.members[pid]

    def family(self):
        """Return the family, each behind its parent."""
        order = [ROOT]
        for pid in order:
            order += [child for child, one in self.members.items() if one.parent == pid]
        return family({pid: attrs.astuple(self.members[pid])[:3] for pid in order})


def family(places):
    return Family(
        Pid(ROOT),
        {Pid(pid): Place(Pid(p), Pid(s), Pid(g), 17) for pid, (p, s, g) in places.items()},
    )


def follow(plan):
    """Make the tree as a restore does, and return it."""
    world = World(RESTORER, RESTORER_GROUP)
    for pid in plan.places:
        births = plan.births(pid)
        for child in births.before_leaving:
            world.fork(pid, child)
        if plan.leads_session(pid):
            world.setsid(pid)
        for child in births.after:
            world.fork(pid, child)
    helpers = plan.groups_without_leader()
    for helper, member in helpers.items():
        world.fork(member, helper)
        world.setpgid(helper, helper)
    for pid, group in plan.iter_joins():
        world.setpgid(pid, RESTORER_GROUP if group is None else group)
    for helper in helpers:
        del world.members[helper]
    return world


def shown(plan):
    """Return the places of a family, with one name for everything that is not of the tree."""
    return {
        pid: (
            place.parent,
            place.session if place.session in plan.places else "outer",
            "outer" if plan.is_outside(place) else place.group,
        )
        for pid, place in plan.places.items()
    }


@st.composite
def histories(draw, *, adopts):
    """Return a world in which something has happened."""
    world = World(OUTER, OUTER_GROUP)
    start = draw(st.sampled_from(["group", "session", "outer"]))
    if start == "session":
        world.setsid(ROOT)
    elif start == "group":
        world.setpgid(ROOT, ROOT)
    for _ in range(draw(st.integers(1, 25))):
        living = [pid for pid, one in world.members.items() if not one.ended]
        step = draw(st.sampled_from(["fork", "fork", "setsid", "own", "join", "end", "reap"]))
        with contextlib.suppress(PermissionError):
            take(world, step, draw(st.sampled_from(living)), draw, adopts=adopts)
    return world


def take(world, step, pid, draw, *, adopts):
    """Do one step of a history, if the kernel lets it."""
    members = world.members
    if step == "fork":
        world.fork(pid)
    elif step == "setsid":
        world.setsid(pid)
    elif step == "own":
        world.setpgid(pid, pid)
    elif step == "join":
        world.setpgid(pid, members[draw(st.sampled_from(sorted(members)))].group)
    elif step == "end" and pid != ROOT:
        world.end(pid, adopts=adopts)
    elif step == "reap" and any(one.ended for one in members.values()):
        del members[draw(st.sampled_from([pid for pid, one in members.items() if one.ended]))]


def go_round(world):
    """Tell whether former leaders stand in each other's groups, which nobody can make again."""
    members = world.members
    for pid in members:
        seen = []
        while members[pid].group in members and members[pid].group != pid and pid not in seen:
            seen.append(pid)
            pid = members[pid].group
        if pid in seen:
            return True
    return False


@given(histories(adopts=False))
def test_whatever_has_happened_can_be_made_again(world):
    plan = world.family()
    assert list(plan.iter_findings()) == []
    if not go_round(world):
        made = follow(plan).family()
        assert shown(made) == shown(plan)


@given(histories(adopts=True))
def test_what_was_adopted_is_made_again_or_named(world):
    plan = world.family()
    if list(plan.iter_findings()) == [] and not go_round(world):
        made = follow(plan).family()
        assert shown(made) == shown(plan)


def test_a_child_that_is_older_than_its_parents_session_is_born_before():
    plan = family({10: (0, 5, 6), 11: (10, 11, 11), 12: (11, 5, 6), 13: (11, 11, 11)})
    assert plan.births(Pid(10)) == Births((), (11,))
    assert plan.births(Pid(11)) == Births((12,), (13,))


def test_a_grandchild_tells_when_its_parent_was_born():
    plan = family({10: (0, 5, 6), 11: (10, 11, 11), 12: (11, 12, 12), 13: (12, 5, 6)})
    assert plan.births(Pid(11)) == Births((12,), ())
    assert plan.births(Pid(12)) == Births((13,), ())


@pytest.mark.parametrize(("group", "helpers"), [(6, {}), (9, {9: 11})])
def test_only_a_group_of_the_tree_needs_a_helper(group, helpers):
    plan = family({10: (0, 5, 6), 11: (10, 5, group)})
    assert plan.groups_without_leader() == helpers


def test_a_group_that_is_led_from_outside_is_that_of_the_restorer():
    plan = family({10: (0, 10, 10), 11: (10, 5, records.OUTER_GROUP)})
    assert plan.groups_without_leader() == {}
    assert plan.births(Pid(10)) == Births((11,), ())
    assert list(plan.iter_joins()) == []


def test_a_leader_that_has_left_its_group_leaves_it_when_the_others_are_in():
    plan = family({10: (0, 5, 6), 11: (10, 5, 6), 12: (10, 5, 11)})
    assert list(plan.iter_joins()) == [(11, 11), (12, 11), (11, None)]


def test_who_was_adopted_from_a_session_that_the_root_never_had_is_named():
    plan = family({10: (0, 5, 6), 11: (10, 9, 9)})
    (finding,) = plan.iter_findings()
    assert finding.subject == "process 11"
    assert "comes from session 9" in finding.problem


# ---- who shares what is made by somebody who has it


def sharing(places, shares, exit_signals=()):
    plan = family(places)
    signals = dict(exit_signals)
    return Family(
        Pid(ROOT),
        {
            pid: attrs.evolve(place, exit_signal=signals.get(pid, 17))
            for pid, place in plan.places.items()
        },
        {Pid(pid): Shares(**owners) for pid, owners in shares.items()},
    )


BROTHERS = {10: (0, 5, 5), 11: (10, 5, 5), 12: (10, 5, 5)}


def test_who_shares_with_its_parent_is_made_by_that():
    plan = sharing(BROTHERS, {11: {"files": 10}, 12: {"files": 10, "directories": 10}})
    assert [plan.find_maker(11), plan.find_maker(12)] == [10, 10]


def test_who_shares_with_its_brother_is_made_by_that():
    plan = sharing(BROTHERS, {12: {"files": 11}})
    assert plan.find_maker(12) == 11
    assert list(plan.iter_findings()) == []


def test_who_shares_with_somebody_farther_away_is_named():
    plan = sharing({**BROTHERS, 13: (11, 5, 5)}, {13: {"directories": 12}})
    (finding,) = plan.iter_findings()
    assert finding.subject == "process 13"
    assert "shares its directories with process 12" in finding.problem


def test_a_brother_must_have_all_of_it():
    plan = sharing(BROTHERS, {12: {"files": 11, "directories": 10}})
    assert plan.find_maker(12) is None
    both = sharing(BROTHERS, {11: {"directories": 10}, 12: {"files": 11, "directories": 10}})
    assert both.find_maker(12) == 11


def test_a_brother_gives_its_own_exit_signal():
    assert sharing(BROTHERS, {12: {"files": 11}}, {11: 10}.items()).find_maker(12) is None


def test_a_brother_of_another_session_cannot_make_it():
    # The parent leads a session of its own now; 11 was born before that, 12 after.
    left = {10: (0, 10, 10), 11: (10, 5, 5), 12: (10, 10, 10)}
    assert sharing(left, {12: {"files": 11}}).find_maker(12) is None
