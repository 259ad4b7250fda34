"""The promise: rounds go on while they help, end always, and what does not fit is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.convergence import Rest, Verdict, decide

MIB = 1 << 20


def rest(mib, n_runs=1):
    return Rest(n_runs, int(mib * MIB))


def verdict(*mib, budget_ms=10.0, begin_ms=0.0):
    return decide([rest(one) for one in mib], budget_ms=budget_ms, begin_ms=begin_ms)


def test_little_is_copied_in_the_freeze():
    assert verdict(0.1) is Verdict.FREEZE
    assert verdict(1024, 0.1) is Verdict.FREEZE


def test_a_stop_more_is_not_worth_less_than_it_costs():
    assert verdict(8, begin_ms=4) is Verdict.FREEZE
    assert verdict(8, begin_ms=0) is Verdict.COPY
    assert verdict(32, begin_ms=4) is Verdict.COPY
    assert verdict(64, 8, begin_ms=4) is Verdict.COPY


def test_much_is_copied_before():
    assert verdict(1024) is Verdict.COPY
    assert verdict(1024, 200) is Verdict.COPY
    assert verdict(1024, 200, 30) is Verdict.COPY


def test_a_budget_of_nothing_asks_for_rounds_as_long_as_they_help():
    assert verdict(0.1, budget_ms=0) is Verdict.COPY
    assert verdict(0.1, 0.1, 0.1, budget_ms=0) is Verdict.GIVE_UP


def test_many_runs_are_much():
    assert decide([Rest(1, 1), Rest(10_000, 10_000)], budget_ms=10, begin_ms=0) is Verdict.COPY


def test_a_rest_that_fits_and_does_not_shrink_ends_the_rounds():
    assert verdict(1024, 20, 19) is Verdict.FREEZE


def test_a_rest_that_does_not_fit_has_a_second_chance():
    assert verdict(1024, 900) is Verdict.COPY
    assert verdict(1024, 900, 880) is Verdict.GIVE_UP
    assert verdict(1024, 900, 400) is Verdict.COPY


@pytest.mark.parametrize("budget_ms", [0.0, 1.0, 10.0, 1000.0])
@given(st.lists(st.floats(0.001, 10_000), min_size=14, max_size=14))
def test_it_ends_and_never_freezes_over_the_budget(budget_ms, mib):
    rests = []
    for one in mib:
        rests.append(rest(one))
        answer = decide(rests, budget_ms=budget_ms, begin_ms=0)
        if answer is not Verdict.COPY:
            break
    assert answer is not Verdict.COPY
    fits = rests[-1].copy_ms <= budget_ms
    assert (answer is Verdict.FREEZE) == fits
