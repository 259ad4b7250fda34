"""Each way of changing memory under each tracker of this kernel: dumps, a kill, a restore.

The logic is `integration.trackers.cases`; the same runs on the machine's own kernel.
"""

import pytest

from ckpt import probe_features
from ckpt.tracker.base import TELLING as TELLING_TRACKERS
from integration.trackers.cases import CASES, offered, run_case, run_with_second_directory
from integration.trackers.warm import AS_MANY_ROUNDS_AS_HELP
from integration.workloads.catalog import TRACKER_CASES

TRACKERS = offered(probe_features())
# They look at the content; what differs from kernel to kernel is how they find what is there.
BY_CONTENT = {"compare", "full"}
TELLING = {"t_dontneed", "t_exec", "t_file_private", "t_mremap", "t_remap_same", "t_thp"}
MOVING = {"t_full_speed", "t_fork", "t_mremap", "t_remap_same"}
RUNS = [
    (case, tracker)
    for case in CASES
    for tracker in TRACKERS
    if tracker not in BY_CONTENT or case in TELLING
]


@pytest.mark.parametrize(("case", "tracker"), RUNS)
def test_a_changed_page_is_in_the_delta_and_comes_back(case, tracker, tmp_path):
    # One delta for all steps: on this processor a dump takes a second.
    print(*run_case(case, tracker, tmp_path, [TRACKER_CASES[case]], go_on=False), sep="\n")


@pytest.mark.parametrize("tracker", sorted({*TRACKERS} & TELLING_TRACKERS))
@pytest.mark.parametrize("case", sorted(MOVING))
def test_a_changed_page_is_in_the_delta_that_is_copied_in_rounds(case, tracker, tmp_path):
    steps = [TRACKER_CASES[case]]
    rows = run_case(
        case, tracker, tmp_path, steps, go_on=False, max_freeze_ms=AS_MANY_ROUNDS_AS_HELP
    )
    print(*rows, sep="\n")


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_dump_into_a_second_directory_costs_a_full_one(tracker, tmp_path):
    run_with_second_directory(tracker, tmp_path)


def test_the_trackers_are_those_that_this_kernel_is_known_to_offer(kernel_under_test):
    needs = {"softdirty": "soft_dirty", "writeprotect": "uffd_wp_async"}
    known = [name for name, needed in needs.items() if needed in kernel_under_test.offers]
    assert [*known, "compare", "full"] == TRACKERS
