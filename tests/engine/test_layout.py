"""The promise: what a restore needs for itself is in nobody's way."""

import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.layout import SPARE_BYTES, choose_arena, number_inherited, spans_of
from ckpt.errors import HostFull
from ckpt.kernel.arch import x86_64 as arch
from ckpt.process.arena import ARENA_SIZE
from ckpt.process.programs import LOAD_AT
from ckpt.resources.base import Opened
from ckpt.tracker.spans import join
from ckpt.units import Fd, addr_range

HALF = arch.USER_END // 2
PAGE = arch.PAGE_SIZE
NEED = ARENA_SIZE + SPARE_BYTES

mapped = st.lists(
    st.tuples(st.integers(0, 4000), st.integers(1, 2000)).map(
        lambda pair: (pair[0] * PAGE, (pair[0] + pair[1]) * PAGE)
    ),
    max_size=6,
)


def is_free(start, end, taken):
    return all(end <= low or high <= start for low, high in taken)


@given(mapped)
def test_the_arena_and_what_it_spares_are_free(taken):
    arena = choose_arena(join(taken))
    assert arena.len_bytes == ARENA_SIZE
    assert arena.start % PAGE == 0
    assert is_free(arena.start, arena.start + NEED, taken)
    assert is_free(arena.start, arena.end, [(0, LOAD_AT + 2 * PAGE)]), "not in the seed itself"


@given(mapped)
def test_it_is_the_lowest_place(taken):
    """Far from the embryo's own stack and vdso, which lie at the upper end."""
    arena = choose_arena(join(taken))
    lower = range(0x100000, arena.start, PAGE)
    assert not any(is_free(at, at + NEED, taken) for at in lower)


def test_a_hole_of_exactly_the_right_size_will_do():
    taken = [(0, 0x40_0000), (0x40_0000 + NEED, HALF)]
    assert choose_arena(taken).start == 0x40_0000


def test_a_hole_that_is_one_page_too_small_will_not():
    taken = [(0, 0x40_0000), (0x40_0000 + NEED - PAGE, 0x80_0000)]
    assert choose_arena(taken).start == 0x80_0000


@pytest.mark.parametrize("free", [0, NEED - PAGE])
def test_no_hole_in_the_lower_half(free):
    with pytest.raises(HostFull, match="leaves no room"):
        choose_arena([(0, HALF // PAGE * PAGE - free), (HALF, arch.USER_END)])


def test_spans_of_neighbours_are_one():
    spans = spans_of([addr_range(0x2000, 0x1000), addr_range(0x1000, 0x1000)])
    assert spans == [(0x1000, 0x3000)]
    assert spans_of([]) == []


# -- descriptors -----------------------------------------------------------------------------------


def opened(n):
    return {f"key {index}": Opened(Fd(100 + index)) for index in range(n)}


@pytest.mark.parametrize(("highest", "first"), [(-1, 3), (0, 3), (2, 3), (3, 4), (40, 41)])
def test_numbers_begin_above_those_of_the_image(highest, first):
    fds, numbers = number_inherited(opened(3), highest)
    assert numbers == {"key 0": first, "key 1": first + 1, "key 2": first + 2}
    assert fds == {first: 100, first + 1: 101, first + 2: 102}


def test_nothing_to_inherit():
    assert number_inherited({}, 7) == ({}, {})


@pytest.fixture
def own_limit():
    """Put the limit of open files back: it is raised for as long as a restore needs it."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_to_what_is_needed(own_limit):
    soft, hard = 128, own_limit[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    fds, _ = number_inherited(opened(2), 500)
    now, still = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert still == hard
    assert now > max(fds), "the seed can have these numbers"


def test_a_limit_that_suffices_is_left_alone(own_limit):
    number_inherited(opened(2), 5)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == own_limit


def test_a_hard_limit_that_is_too_low(own_limit):
    hard = own_limit[1]
    with pytest.raises(HostFull, match="ulimit -Hn") as caught:
        number_inherited(opened(2), hard)
    assert caught.value.exit_code == 13
