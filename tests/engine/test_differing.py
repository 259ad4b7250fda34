"""The promise: a page is compared only if it may differ, and counted only if it does."""

from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.differing import pair_mappings, tell_apart
from ckpt.engine.portrait import MappingView
from ckpt.image.runs import Fate, ResolvedRuns

PAGE = 4096


def runs_of(pages):
    """Make runs from page number -> (fate, generation, ordinal)."""
    runs = ResolvedRuns.empty(PAGE)
    for page, (fate, generation, source) in sorted(pages.items()):
        runs.append(page * PAGE, 1, fate, generation, source)
    return runs


places = st.one_of(
    st.builds(lambda g: (Fate.ZERO, g, 0), st.integers(0, 2)),
    st.builds(lambda g: (Fate.FILE, g, 0), st.integers(0, 2)),
    st.builds(lambda g, s: (Fate.DATA, g, s), st.integers(0, 1), st.integers(0, 12)),
)
spaces = st.dictionaries(st.integers(0, 12), places)


def fate_of(before, after):
    """What is known of a page from where two generations have it."""
    if Fate.FILE in (before[0], after[0]):
        return "same" if before[0] == after[0] else "differs"
    if before[0] == after[0] == Fate.ZERO:
        return "same"
    return "same" if before == after else "unsure"


@given(spaces, spaces)
def test_what_two_generations_say_of_the_same_pages(before, after):
    apart = tell_apart(runs_of(before), runs_of(after))
    told = {page: fate_of(before[page], after[page]) for page in before.keys() & after.keys()}
    assert apart.n_common == len(told)
    for spans, word in ((apart.differing, "differs"), (apart.unsure, "unsure")):
        pages = [at // PAGE for start, end in spans for at in range(start, end, PAGE)]
        assert pages == sorted(page for page, said in told.items() if said == word)


def mapping(start, end, name="", *, access="rw-p", offset=0):
    return MappingView(start * PAGE, end * PAGE, access, offset * PAGE, name, 0, 0, 0, None)


def pairs(before, after):
    return [(before.index(one), after.index(other)) for one, other in pair_mappings(before, after)]


def test_a_mapping_that_grew_shrank_or_was_protected_is_the_same_one():
    before = [mapping(0, 4), mapping(8, 12), mapping(20, 24)]
    after = [mapping(0, 6), mapping(10, 12), mapping(20, 24, access="r--p")]
    assert pairs(before, after) == [(0, 0), (1, 1), (2, 2)]


def test_of_a_mapping_that_was_cut_in_two_the_first_part_is_the_same_one():
    before = [mapping(0, 8)]
    after = [mapping(1, 3), mapping(3, 5, access="r--p"), mapping(5, 8)]
    assert pairs(before, after) == [(0, 0)]


def test_what_is_of_another_file_or_of_another_place_in_it_is_another_mapping():
    before = [mapping(0, 4, "/a"), mapping(4, 8, "/a", offset=4), mapping(8, 9), mapping(9, 10)]
    after = [
        mapping(0, 4, "/b"),
        mapping(4, 8, "/a", offset=5),
        mapping(8, 9, "/a"),
        mapping(9, 10, access="rw-s"),
    ]
    assert pairs(before, after) == []
    moved = [mapping(5, 8, "/a", offset=5)]
    assert pairs(before, moved) == [(1, 0)]


def test_a_mapping_is_found_behind_another_that_came_before_it():
    before = [mapping(0, 8, "/a")]
    after = [mapping(0, 4), mapping(4, 8, "/a", offset=4)]
    assert pairs(before, after) == [(0, 1)]
