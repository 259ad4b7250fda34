"""Each way of changing memory, under each tracker that this kernel offers."""

import pytest

from ckpt import probe_features
from ckpt.tracker.base import TELLING
from integration.trackers.cases import CASES, offered, run_case, run_with_second_directory
from integration.trackers.warm import AS_MANY_ROUNDS_AS_HELP
from integration.workloads.catalog import TRACKER_CASES

TRACKERS = offered(probe_features())


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("case", CASES)
def test_a_changed_page_is_in_the_delta_and_comes_back(case, tracker, tmp_path):
    steps = TRACKER_CASES[case]
    stretches = [[step] for step in [*steps, *steps[::-1]]]
    print(*run_case(case, tracker, tmp_path, [*stretches, steps], older=[1]), sep="\n")


@pytest.mark.parametrize("tracker", sorted({*TRACKERS} & TELLING))
@pytest.mark.parametrize("case", CASES)
def test_a_changed_page_is_in_the_delta_that_is_copied_in_rounds(case, tracker, tmp_path):
    steps = TRACKER_CASES[case]
    rows = run_case(
        case,
        tracker,
        tmp_path,
        [[step] for step in steps],
        older=[1],
        max_freeze_ms=AS_MANY_ROUNDS_AS_HELP,
    )
    print(*rows, sep="\n")


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_dump_into_a_second_directory_costs_a_full_one(tracker, tmp_path):
    run_with_second_directory(tracker, tmp_path)


def test_this_kernel_offers_a_tracker_that_needs_no_comparing():
    assert set(TRACKERS) > {"compare", "full"}
