"""The promise: the algebra of spans is that of plain sets, and keeps its own form."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ckpt.tracker.spans import intersect, join, subtract, total_bytes, unite

LIMIT = 60


def plain(spans):
    """Return the bytes of spans as a set."""
    return {byte for start, end in spans for byte in range(start, end)}


def is_canonical(spans):
    """Tell whether spans are ascending and disjoint, with no empty range."""
    ascending = all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    return ascending and all(start < end for start, end in spans)


pieces = st.lists(st.tuples(st.integers(0, LIMIT), st.integers(0, LIMIT)), max_size=12)
canonical = pieces.map(join)
touching = st.lists(st.integers(1, 5), max_size=14).map(
    # Neighbours that touch are allowed in an operand: no gap between some of the ranges.
    lambda lengths: [
        (sum(lengths[:index]), sum(lengths[: index + 1]))
        for index in range(len(lengths))
        if lengths[index] != 3
    ]
)
operands = canonical | touching


@given(pieces)
def test_join(given_pieces):
    joined = join(given_pieces)
    assert plain(joined) == plain(given_pieces)
    assert is_canonical(joined)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(joined))


@given(pieces)
def test_join_of_joined_is_the_same(given_pieces):
    joined = join(given_pieces)
    assert join(joined) == joined
    assert join(reversed(joined)) == joined


@given(operands, operands)
def test_intersect(left, right):
    both = intersect(left, right)
    assert plain(both) == plain(left) & plain(right)
    assert is_canonical(both)


@given(operands, operands)
def test_unite(left, right):
    for few in (right, right[:1], right[-1:]):
        for both in (unite(left, few), unite(few, left)):
            assert plain(both) == plain(left) | plain(few)
            assert is_canonical(both)


@given(operands, operands)
def test_subtract(left, right):
    rest = subtract(left, right)
    assert plain(rest) == plain(left) - plain(right)
    assert is_canonical(rest)


@given(operands)
def test_total(spans):
    assert total_bytes(spans) == len(plain(spans))


@given(operands, operands)
def test_operands_are_left_as_they_were(left, right):
    before = list(left), list(right)
    intersect(left, right)
    subtract(left, right)
    join(left)
    assert (left, right) == before


def test_no_range_at_all():
    assert join([]) == intersect([], [(1, 2)]) == subtract([], [(1, 2)]) == []
    assert subtract([(1, 2)], []) == [(1, 2)]
    assert total_bytes([]) == 0
