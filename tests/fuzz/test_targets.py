"""The promise: no bytes bring a decoder to anything but a value or its own error.

Always the same changes of the same bytes, some hundred for each target; `make fuzz` looks for more.
"""

import pytest

from tests.fuzz.changes import change, drawn
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS, run_bounded

N_RUNS = {"chain": 60, "records": 150}
N_RUNS_OTHERWISE = 400


@pytest.fixture(scope="module")
def all_seeds():
    return seeds()


@pytest.mark.parametrize("target", TARGETS)
def test_good_bytes_are_taken_with_little_memory(target, all_seeds):
    assert all_seeds[target]
    for data in all_seeds[target]:
        run_bounded(target, data)


@pytest.mark.parametrize("target", TARGETS)
def test_changed_bytes_end_in_a_value_or_in_an_error_of_their_own(target, all_seeds):
    known = all_seeds[target]
    for number in range(N_RUNS.get(target, N_RUNS_OTHERWISE)):
        draw = drawn(f"{target} {number}")
        data = change(target, draw.choice(known), draw, known)
        try:
            run_bounded(target, data)
        except Exception as error:
            error.add_note(f"number {number}: TARGETS[{target!r}]({data!r})")
            raise
