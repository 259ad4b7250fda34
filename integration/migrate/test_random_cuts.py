"""A few of the random cuts and kills (`make random-cuts` runs a hundred), one tree through all."""

import pytest

from integration.migrate.random_cuts import CUTS, Choice, measure, run_one

SEEDS = (1006, 1009, 1010, 1004, 1045)


@pytest.mark.slow
def test_exactly_one_copy_runs_after_each(tree):
    choices = [Choice.of(seed) for seed in SEEDS]
    assert {one.what for one in choices} == {*CUTS, "worker", "source", "heir"}
    usual = measure(tree)
    for choice in choices:
        run_one(tree, choice, usual)
