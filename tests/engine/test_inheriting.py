"""Which pages of its parent a child has already."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.inheriting import Inheritance, plan_fill, same_pages, stored_pages
from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.tracker.spans import join, subtract

PAGE = 4096


@st.composite
def page_spaces(draw):
    """Address -> what an image has there: (fate, generation, source)."""
    pages = {}
    at = 0
    for _ in range(draw(st.integers(0, 6))):
        at += draw(st.integers(0, 3))
        fate = draw(st.sampled_from([Fate.DATA, Fate.DATA, Fate.ZERO, Fate.FILE]))
        generation, source = draw(st.integers(0, 1)), at + draw(st.sampled_from([0, 0, 7]))
        for n in range(draw(st.integers(1, 4))):
            pages[at] = (fate, generation, source + n if fate is Fate.DATA else 0)
            at += 1
    return pages


def runs_of(pages):
    runs = ResolvedRuns(PAGE, array("Q"), array("Q"), array("B"), array("I"), array("Q"))
    for at, (fate, generation, source) in sorted(pages.items()):
        runs.append(at * PAGE, 1, fate, generation, source)
    return runs


def spans_of(pages):
    return join((at * PAGE, (at + 1) * PAGE) for at in pages)


def plan_fill_of(child, kept, parent):
    inherited = Inheritance((), parent, stored_pages(parent))
    return plan_fill(child, stored_pages(child), kept, inherited)


@given(page_spaces(), page_spaces())
def test_the_same_page_of_the_same_generation_is_the_same(left, right):
    same = {at for at, page in left.items() if page[0] is Fate.DATA and right.get(at) == page}
    assert same_pages(runs_of(left), runs_of(right)) == spans_of(same)


@given(page_spaces())
def test_a_child_that_has_written_nothing_is_given_nothing(pages):
    runs = runs_of(pages)
    plan = plan_fill_of(runs, spans_of(pages), runs)
    assert plan is None if not pages else (plan.write, plan.drop, plan.over) == ([], [], [])


@given(page_spaces(), page_spaces())
def test_what_is_not_kept_is_written(parent, child):
    kept = [(0, 8 * PAGE)]
    plan = plan_fill_of(runs_of(child), kept, runs_of(parent))
    outside = subtract(stored_pages(runs_of(child)), kept)
    assert subtract(outside, plan.write) == []


def test_who_inherits_nothing_is_filled_wholly():
    assert plan_fill(runs_of({}), [], [(0, PAGE)], Inheritance()) is None
