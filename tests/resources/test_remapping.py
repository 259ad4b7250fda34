"""What is mapped becomes what is wanted, by what a plan says and nothing more."""

import itertools

import attrs
from hypothesis import given
from hypothesis import strategies as st

from ckpt.resources.remapping import Mapping, Pages, Part, plan_pages, plan_remapping
from ckpt.tracker.spans import intersect, join, subtract

END = 24
"""Addresses are small numbers here: nothing depends on the size of a page, but `LONG`."""
LONG = 32 << 10


JOINS = st.just(True)


def layouts(*, joins=JOINS):
    """Ascending, disjoint mappings of two files and of nothing, some as the same file lies."""

    @st.composite
    def build(draw):
        cuts = sorted(draw(st.sets(st.integers(0, END), max_size=10)))
        found = []
        for start, end in itertools.pairwise(cuts):
            backing = draw(st.sampled_from(["", "", "file", "shared", None]))
            if backing is None:
                continue
            offset = start + draw(st.integers(0, 1)) if backing else None
            found.append(
                Mapping(start, end, backing, offset, draw(st.sampled_from([1, 3])), draw(joins))
            )
        return found

    return build()


def model_of(mappings):
    """Return what is behind each address."""
    return {
        at: (
            one.backing,
            None if one.offset_bytes is None else one.offset_bytes + at - one.start,
            one.prot,
        )
        for one in mappings
        for at in range(one.start, one.end)
    }


def parts_of(parts, wanted):
    assert all(wanted[p.index].start <= p.start < p.end <= wanted[p.index].end for p in parts)
    return [(p, at) for p in parts for at in range(p.start, p.end)]


@given(
    layouts(joins=st.booleans()),
    layouts(),
    st.lists(st.tuples(st.integers(0, END), st.integers(0, END)), max_size=3),
)
def test_a_plan_leads_from_any_layout_to_any_other(now, wanted, others):
    here = model_of(now)
    others = join(others)
    plan = plan_remapping(now, wanted, others)
    here |= {at: "other" for span in others for at in range(*span) if at not in here}
    for at in (at for span in plan.unmap for at in range(*span)):
        del here[at]
    goal = model_of(wanted)
    # What stays is the page that is wanted, whatever its protection.
    assert {at: kind[:2] for at, kind in here.items()} == {
        at: goal[at][:2] for span in plan.keep for at in range(*span)
    }
    for part, at in parts_of(plan.new, wanted):
        assert at not in here
        here[at] = goal[at]
        assert part.index < len(wanted)
    for _, at in parts_of(plan.protect, wanted):
        assert here[at] != goal[at]
        here[at] = goal[at]
    assert here == goal


@given(layouts(joins=st.booleans()), layouts())
def test_each_mapping_is_one_in_the_end(now, wanted):
    plan = plan_remapping(now, wanted)
    for index, one in enumerate(wanted):
        kept = intersect([(one.start, one.end)], plan.keep)
        assert len(kept) <= 1
        added = [part for part in plan.new if part.index == index]
        forked = [n for n in now if not n.joins and intersect([(n.start, n.end)], kept)]
        assert not (kept and added and forked)


@given(layouts(joins=st.booleans()))
def test_what_is_as_wanted_stays(now):
    plan = plan_remapping(now, now, [(one.start, one.end) for one in now])
    assert (plan.unmap, plan.new, plan.protect) == ([], (), ())


def test_a_mapping_that_has_grown_keeps_what_it_had_unless_it_was_forked():
    now = Mapping(4, 8, "", prot=3)
    wanted = [attrs.evolve(now, start=2, end=12)]
    plan = plan_remapping([now], wanted)
    assert plan.keep == [(4, 8)]
    assert plan.new == (Part(0, 2, 4), Part(0, 8, 12))
    forked = plan_remapping([attrs.evolve(now, joins=False)], wanted)
    assert (forked.keep, forked.unmap) == ([], [(4, 8)])
    assert forked.new == (Part(0, 2, 12),)


def test_parts_of_a_forked_mapping_stay_and_are_protected():
    now = [Mapping(0, 12, "", prot=3, joins=False)]
    wanted = [Mapping(0, 4, "", prot=3), Mapping(4, 6, "", prot=1), Mapping(9, 12, "", prot=3)]
    plan = plan_remapping(now, wanted)
    assert (plan.keep, plan.unmap) == ([(0, 6), (9, 12)], [(6, 9)])
    assert (plan.new, plan.protect) == ((), (Part(1, 4, 6),))


def test_of_two_pieces_the_bigger_one_stays():
    now = [Mapping(0, 2, ""), Mapping(4, 8, "")]
    plan = plan_remapping(now, [Mapping(0, 8, "")])
    assert (plan.keep, plan.unmap) == ([(4, 8)], [(0, 2)])


def test_a_file_that_lies_otherwise_is_another():
    assert plan_remapping([Mapping(0, 4, "f", 0)], [Mapping(2, 6, "f", 0)]).keep == []
    assert plan_remapping([Mapping(0, 4, "f", 0)], [Mapping(2, 6, "f", 2)]).keep == [(2, 4)]
    assert plan_remapping([Mapping(0, 4, "f", 0)], [Mapping(0, 4, "f")]).keep == []


def spans():
    return st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6).map(
        lambda pairs: join((a * LONG // 4, b * LONG // 4) for a, b in pairs)
    )


@given(spans(), spans(), spans(), spans())
def test_pages_are_what_is_wanted_in_the_end(keep, there, right, wanted):
    there = intersect(keep, there)
    right = intersect(intersect(there, right), wanted)
    plan = plan_pages(keep, there, right, wanted)
    here = subtract(there, plan.drop)
    # Nothing that is right is touched, and what is written is absent or said to be over something.
    assert intersect(right, join([*plan.drop, *plan.write])) == []
    assert intersect(here, plan.write) == plan.over
    assert join([*here, *plan.write]) == wanted
    assert join([*right, *plan.write]) == wanted


def test_long_wrong_parts_are_dropped_and_short_ones_written_over():
    there = [(0, 10 * LONG)]
    wanted = [(0, LONG), (2 * LONG, 2 * LONG + 4096)]
    plan = plan_pages(there, there, [], wanted)
    assert plan == Pages(
        wanted, [(0, 2 * LONG), (2 * LONG + 4096, 10 * LONG)], [(2 * LONG, 2 * LONG + 4096)]
    )
