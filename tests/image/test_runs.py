"""Run tables: what they refuse, how they pack, and how one lies over another."""

from array import array

import pytest

from ckpt.image.runs import (
    Fate,
    ResolvedRun,
    ResolvedRuns,
    Run,
    RunTable,
    RunTableBuilder,
    overlay,
)
from ckpt.units import AddrRange

PAGE = 4096


def table(*runs):
    """Make a table of (page, n_pages, fate, source) without any joining or checking."""
    made = RunTable.empty(PAGE)
    for page, n, fate, source in runs:
        made.starts.append(int(page * PAGE))
        made.n_pages.append(n)
        made.fates.append(fate)
        made.sources.append(source)
    return made


def resolved(*runs):
    made = ResolvedRuns.empty(PAGE)
    for page, n, fate, generation, source in runs:
        made.append(page * PAGE, n, fate, generation, source)
    return made


def test_builder_joins_what_belongs_together():
    builder = RunTableBuilder(PAGE)
    builder.add(0, 2, Fate.DATA, 0)
    builder.add(2 * PAGE, 1, Fate.DATA, 2)
    builder.add(3 * PAGE, 1, Fate.DATA, 7)
    builder.add(4 * PAGE, 1, Fate.ZERO)
    builder.add(5 * PAGE, 1, Fate.ZERO)
    builder.add(7 * PAGE, 1, Fate.ZERO)
    builder.add(8 * PAGE, 0, Fate.FILE)
    assert builder.build() == table(
        (0, 3, Fate.DATA, 0),
        (3, 1, Fate.DATA, 7),
        (4, 2, Fate.ZERO, 0),
        (7, 1, Fate.ZERO, 0),
    )


def test_builder_refuses_what_is_not_ascending():
    builder = RunTableBuilder(PAGE)
    builder.add(PAGE, 2, Fate.ZERO)
    with pytest.raises(ValueError, match="0x2000 comes after"):
        builder.add(2 * PAGE, 1, Fate.ZERO)


def test_packed_layout_is_the_specified_one():
    packed = table((1, 2, Fate.DATA, 5), (0x7FF, 1, Fate.ZERO, 0)).pack()
    words = (2, 0x1000, 0x7FF000, 2, 1, 5, 0)
    assert packed == b"".join(n.to_bytes(8, "little") for n in words) + bytes([1, 2])
    assert RunTable.unpack(packed, PAGE) == table((1, 2, Fate.DATA, 5), (0x7FF, 1, Fate.ZERO, 0))


PACKED = table((1, 2, Fate.DATA, 5)).pack()


@pytest.mark.parametrize(
    "packed", [PACKED[:-1], PACKED + b"x", b"\xff" * 8 + PACKED[8:], bytes(7), b""]
)
def test_unpack_refuses_another_length(packed):
    with pytest.raises(ValueError, match="cannot hold"):
        RunTable.unpack(packed, PAGE)


def test_validate_accepts_the_whole_address_space():
    table((0, 1 << 52, Fate.ZERO, 0)).validate(0, parent_allowed=False)


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ([(0, 0, Fate.ZERO, 0)], "no pages"),
        ([(0, 2, Fate.ZERO, 0), (1, 1, Fate.ZERO, 0)], "overlap"),
        ([(5, 1, Fate.ZERO, 0), (1, 1, Fate.ZERO, 0)], "out of order"),
        ([(1, 1 << 52, Fate.ZERO, 0)], "leave the address space"),
        ([(0, 1, 4, 0)], "unknown fate"),
        ([(0, 1, Fate.PARENT, 0)], "refers to a parent"),
        ([(0, 2, Fate.DATA, 9)], "page stream of 10"),
        ([(0, 2, Fate.ZERO, 1)], "has a source"),
        ([(0.5, 1, Fate.ZERO, 0)], "multiple of 4096"),
    ],
)
def test_validate_refuses(runs, reason):
    with pytest.raises(ValueError, match=reason):
        table(*runs).validate(10, parent_allowed=False)


def test_validate_refuses_columns_of_different_length():
    made = table((0, 1, Fate.ZERO, 0))
    made.fates.append(Fate.ZERO)
    with pytest.raises(ValueError, match="differ in length"):
        made.validate(0, parent_allowed=False)


def test_lookup_finds_the_run_and_the_holes():
    made = table((1, 2, Fate.DATA, 5), (9, 1, Fate.ZERO, 0))
    first = Run(PAGE, 2, Fate.DATA, 5)
    assert made.lookup(PAGE - 1) is None
    assert made.lookup(PAGE) == first
    assert made.lookup(3 * PAGE - 1) == first
    assert made.lookup(3 * PAGE) is None
    assert made.lookup(9 * PAGE).fate is Fate.ZERO
    assert made.lookup(10 * PAGE) is None


def test_totals_name_every_fate():
    made = table((0, 2, Fate.DATA, 0), (2, 3, Fate.PARENT, 0), (9, 4, Fate.DATA, 2))
    assert made.totals() == {Fate.PARENT: 3, Fate.DATA: 6, Fate.ZERO: 0, Fate.FILE: 0}


def test_overlay_takes_the_middle_of_a_run_with_its_source():
    below = resolved((0, 10, Fate.DATA, 0, 100))
    above = table((2, 3, Fate.PARENT, 0), (5, 1, Fate.DATA, 0), (6, 1, Fate.PARENT, 0))
    runs, gaps = overlay(above, 1, below)
    assert gaps == []
    assert list(runs) == [
        ResolvedRun(2 * PAGE, 3, Fate.DATA, 0, 102),
        ResolvedRun(5 * PAGE, 1, Fate.DATA, 1, 0),
        ResolvedRun(6 * PAGE, 1, Fate.DATA, 0, 106),
    ]


def test_overlay_crosses_runs_and_joins_what_continues():
    below = resolved((0, 2, Fate.DATA, 0, 0), (2, 2, Fate.FILE, 0, 0), (4, 2, Fate.ZERO, 0, 0))
    above = table((0, 3, Fate.PARENT, 0), (3, 3, Fate.PARENT, 0))
    runs, gaps = overlay(above, 1, below)
    assert gaps == []
    assert runs == below


def test_overlay_does_not_join_across_generations():
    below = resolved((0, 2, Fate.ZERO, 0, 0))
    runs, _ = overlay(table((0, 2, Fate.PARENT, 0), (2, 2, Fate.ZERO, 0)), 1, below)
    assert [(run.n_pages, run.generation) for run in runs] == [(2, 0), (2, 1)]


def test_overlay_names_what_the_parent_lacks():
    below = resolved((2, 2, Fate.DATA, 0, 0), (6, 2, Fate.DATA, 0, 2))
    runs, gaps = overlay(table((1, 9, Fate.PARENT, 0)), 1, below)
    assert gaps == [
        AddrRange(1 * PAGE, 2 * PAGE),
        AddrRange(4 * PAGE, 6 * PAGE),
        AddrRange(8 * PAGE, 10 * PAGE),
    ]
    assert runs == below


def test_overlay_without_a_parent_has_only_gaps():
    _, gaps = overlay(table((1, 1, Fate.PARENT, 0)), 1, None)
    assert gaps == [AddrRange(PAGE, 2 * PAGE)]


def test_clip_leaves_out_holes_and_goes_on_within_a_run():
    runs = resolved((0, 10, Fate.DATA, 3, 50), (20, 1, Fate.ZERO, 3, 0))
    wanted = [
        AddrRange(1 * PAGE, 2 * PAGE),
        AddrRange(4 * PAGE, 6 * PAGE),
        AddrRange(9 * PAGE, 30 * PAGE),
    ]
    assert list(runs.clip(wanted)) == [
        ResolvedRun(1 * PAGE, 1, Fate.DATA, 3, 51),
        ResolvedRun(4 * PAGE, 2, Fate.DATA, 3, 54),
        ResolvedRun(9 * PAGE, 1, Fate.DATA, 3, 59),
        ResolvedRun(20 * PAGE, 1, Fate.ZERO, 3, 0),
    ]


def test_a_table_is_columns_and_not_objects():
    made = table((0, 1, Fate.ZERO, 0))
    columns = [made.starts, made.n_pages, made.fates, made.sources]
    assert [(type(column), column.typecode) for column in columns] == [
        (array, "Q"),
        (array, "Q"),
        (array, "B"),
        (array, "Q"),
    ]
