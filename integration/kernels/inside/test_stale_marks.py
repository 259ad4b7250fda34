"""A mapping that moved keeps its marks of protection on some kernels: they must not be believed.

What is written in it after the tracker was prepared, and before its first scan, must be found.
"""

import pytest

from ckpt import probe_features
from ckpt.tracker.base import TELLING
from integration.live.moments import Moment, at
from integration.trackers.cases import Changes, Run, offered
from integration.trackers.truth import Image, settle_on_one_cpu
from integration.trackers.warm import AS_MANY_ROUNDS_AS_HELP, Restored
from integration.workloads.driver import Program

TRACKERS = sorted({*offered(probe_features())} & TELLING)


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("move", ["move", "move_keep"])
def test_a_write_to_a_moved_mapping_right_before_the_first_round_is_found(move, tracker, tmp_path):
    with Program("tracker_cases", "t_mremap", cwd=tmp_path) as work:
        image = Image(tmp_path / "image", work.pid)
        run = Run("t_mremap", tracker, work, image, AS_MANY_ROUNDS_AS_HELP)
        settle_on_one_cpu(work.pid)
        Changes.ask(work)
        run.dump()
        for _ in range(2):
            run.change(move)
            with at(Moment.ROUND, 1, lambda: run.change("one")) as rounds:
                run.dump()
            assert rounds[0], "this was to be a dump in rounds"
        run.check()
    with Restored(image.directory) as work:
        assert work.ask("check") == "ok"
