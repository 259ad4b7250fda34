"""Who of those that were made ahead can stay, and where pages go that come ahead."""

import pytest

from ckpt.engine.family import Family
from ckpt.engine.ground import Changes, plan_changes
from ckpt.engine.prefilling import Prefilled
from ckpt.engine.records import Place
from ckpt.process.clones import Shares
from ckpt.resources.remapping import Mapping

PAGE = 4096
ROOT, CHILD, OTHER, GRANDCHILD = 10, 11, 12, 13
THEN = {
    ROOT: Place(0, 5, ROOT, 17),
    CHILD: Place(ROOT, 5, ROOT, 17),
    OTHER: Place(ROOT, OTHER, OTHER, 17),
    GRANDCHILD: Place(CHILD, 5, ROOT, 17),
}


def changes(changed, then=None, shares=None, made=tuple(THEN)):
    then = then or THEN
    now = {pid: place for pid, place in (then | changed).items() if place}
    return plan_changes(Family(ROOT, then), Family(ROOT, now, shares or {}), made)


def test_nothing_has_changed():
    assert changes({}) == Changes((), ())


def test_who_has_ended_is_ended_before_his_parent():
    assert changes({CHILD: None, GRANDCHILD: None}) == Changes((GRANDCHILD, CHILD), ())


def test_who_has_come_changes_nothing_for_the_others():
    assert changes({20: Place(CHILD, 5, ROOT, 17)}) == Changes((), ())


def test_a_group_is_joined_at_the_end():
    assert changes({CHILD: Place(ROOT, 5, CHILD, 17)}) == Changes((), ())


def test_who_has_left_a_session_since_leaves_it_later():
    assert changes({GRANDCHILD: Place(CHILD, GRANDCHILD, GRANDCHILD, 17)}) == Changes((), ())


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(Place(ROOT, 5, ROOT, 17), id="parent"),
        pytest.param(Place(CHILD, 5, ROOT, 0), id="exit signal"),
        pytest.param(Place(CHILD, OTHER, ROOT, 17), id="session"),
    ],
)
def test_who_stands_elsewhere_is_made_anew(place):
    assert changes({GRANDCHILD: place}) == Changes((), (GRANDCHILD,))


def test_who_leads_no_session_any_more_is_another_process_of_that_number():
    assert changes({OTHER: Place(ROOT, 5, ROOT, 17)}) == Changes((), (OTHER,))


def test_who_shares_something_now_is_made_anew():
    assert changes({}, shares={CHILD: Shares(files=ROOT)}) == Changes((), (GRANDCHILD, CHILD))


def test_an_orphan_is_made_anew_by_whom_he_went_to():
    moved = {CHILD: None, GRANDCHILD: Place(ROOT, 5, ROOT, 17)}
    assert changes(moved) == Changes((CHILD,), (GRANDCHILD,))


def test_who_was_not_made_ahead_is_nobody_s_matter():
    assert changes({GRANDCHILD: None}, made=(ROOT, CHILD, OTHER)) == Changes((), ())


def room(*mapped, aside=()):
    """A process under construction that nothing is asked of: all is mapped, or aside."""
    anonymous = (False, None, frozenset())
    mappings = [Mapping(start * PAGE, end * PAGE, anonymous, None, 3) for start, end in mapped]
    return Prefilled(None, mappings, [(start * PAGE, end * PAGE) for start, end in aside])


def place(start, end, offset):
    return start * PAGE, end * PAGE, offset * PAGE


def piece(start, end, offset):
    return start * PAGE, offset * PAGE, (end - start) * PAGE


def test_pages_that_come_ahead_are_there():
    prefilled = room((10, 20), (20, 30))
    pieces = prefilled.plan([place(12, 14, 0), place(18, 22, 2)])
    assert pieces == [piece(12, 14, 0), piece(18, 22, 2)]
    assert prefilled.there == [(12 * PAGE, 14 * PAGE), (18 * PAGE, 22 * PAGE)]


def test_pages_of_a_frame_that_is_kept_do_not_stay_as_they_were():
    """Else what was put there before would be taken for the newest."""
    prefilled = room((10, 20), aside=[(20, 30)])
    pieces = prefilled.plan([place(10, 12, 0), place(18, 22, 2), place(25, 26, 6)])
    assert pieces == [piece(10, 12, 0), piece(18, 20, 2)]
    assert prefilled.there == [(10 * PAGE, 12 * PAGE), (18 * PAGE, 20 * PAGE)]


def test_pages_of_files_are_put_nowhere_ahead():
    assert room((10, 20), aside=[(20, 30)]).plan([place(22, 23, 0)]) == []


def test_a_frame_without_pages_is_nowhere():
    assert room((10, 20)).plan([]) == []
