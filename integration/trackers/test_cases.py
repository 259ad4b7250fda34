"""Each way of changing memory, under each tracker that this kernel offers."""

import pytest

from ckpt import probe_features
from integration.trackers.cases import CASES, offered, run_case, run_with_second_directory
from integration.workloads.catalog import TRACKER_CASES

TRACKERS = offered(probe_features())


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("case", CASES)
def test_a_changed_page_is_in_the_delta_and_comes_back(case, tracker, tmp_path):
    steps = TRACKER_CASES[case]
    stretches = [[step] for step in [*steps, *steps[::-1]]]
    print(*run_case(case, tracker, tmp_path, [*stretches, steps], older=[1]), sep="\n")


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_dump_into_a_second_directory_costs_a_full_one(tracker, tmp_path):
    run_with_second_directory(tracker, tmp_path)


def test_this_kernel_offers_a_tracker_that_needs_no_comparing():
    assert set(TRACKERS) > {"compare", "full"}
