"""All trackers of this kernel watch the same process: each must name every page that changed.

A page that a tracker calls clean must hold, byte for byte, what it held at the stop before; and
what the program says that it wrote must not be among the clean ones. What a tracker names beyond
what changed is counted; `integration/kernels/README.md`
says what was measured, and why it is so.
"""

import random

import pytest

from ckpt import probe_features
from ckpt.units import Pid
from integration.trackers.cases import CASES, Changes, change_from_outside
from integration.trackers.watch import Watch
from integration.workloads.catalog import TRACKER_CASES
from integration.workloads.driver import Program

FEATURES = probe_features()


def judge(sight, step):
    told = " ".join(
        f"{tracker}: beyond {len(report.beyond)}" for tracker, report in sight.reports.items()
    )
    print(f"{step:12} changed {len(sight.changed):4}, {told}")
    assert [sight.missed(tracker) for tracker in sight.reports] == [[]] * len(sight.reports)


# After an exec there is another address space, which the userfaultfd knows nothing of.
@pytest.mark.parametrize("case", sorted(set(CASES) - {"t_exec"}))
def test_each_names_every_page_that_a_case_changes(case, tmp_path):
    with (
        Program("tracker_cases", case, cwd=tmp_path) as work,
        Watch(Pid(work.pid), FEATURES) as watch,
    ):
        watch.look()
        Changes.ask(work)
        for step in TRACKER_CASES[case]:
            assert work.ask(f"step {step}") == "stepped"
            if case == "t_foreign_write":
                change_from_outside(work, work.pid)
            changes = Changes.ask(work)
            sight = watch.look()
            judge(sight, step)
            for report in sight.reports.values():
                assert not report.clean & changes.written
        assert work.ask("check") == "ok"


def test_each_names_every_page_that_a_busy_writer_changes(tmp_path):
    chance = random.Random(1)
    arguments = ["--mib", "8", "--threads", "2", "--rate", "2000"]
    with (
        Program("writer", *arguments, cwd=tmp_path) as work,
        Watch(Pid(work.pid), FEATURES) as watch,
    ):
        watch.look()
        for number in range(6):
            for _ in range(chance.randrange(2)):
                assert work.ask("step") == "stepped"
            judge(watch.look(), f"stop {number}")
        assert work.ask("check") == "ok"


def test_a_process_that_does_nothing_is_clean_to_each(tmp_path):
    with (
        Program("tracker_cases", "t_write", cwd=tmp_path) as work,
        Watch(Pid(work.pid), FEATURES) as watch,
    ):
        watch.look()
        for _ in range(2):
            sight = watch.look()
            judge(sight, "nothing")
            # The kernel writes the processor's number, when it changes, and the place of the stop.
            assert all(len(report.beyond) <= 2 for report in sight.reports.values())
