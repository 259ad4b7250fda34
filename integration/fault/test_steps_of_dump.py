"""The promise: whichever step of a dump is the last one, target and chain are as they should be.

At each point of a dump that `fault` names, ckpt is killed, or the step fails as where the kernel
refuses it or the disk is full. Each time the target must answer for its state, /proc must show what
it showed before, the chain must verify, and the next dump have each page as it is.
"""

import os
from pathlib import Path

import attrs
import pytest

from ckpt import fault
from ckpt.engine.dump import DumpOptions, dump
from ckpt.image.chain import Chain
from ckpt.image.verify import verify
from ckpt.process.leftovers import find_leftovers
from integration.fault.stepping import (
    KILLED,
    compare_newest,
    ending_of,
    in_child,
    n_keepers,
    settle,
    stop_watching,
    temporaries,
)
from integration.harness import Restored, become_subreaper
from integration.live.sweeping import Sweeper
from integration.procview import lasting_differences, view
from integration.trackers.truth import settle_on_one_cpu
from integration.workloads.driver import ANSWER_S, Program
from tests.plugins.promises import Promise

become_subreaper()

EVERY = bool(os.environ.get("CKPT_KILLS"))
ELSEWHERE = ["dump-doomed", "dump-killed", "dump-cloned"]
"""Of a dump that kills, and of one that makes a twin."""
POINTS = [one for one in (*fault.DUMP, *fault.IMAGE, *fault.EPOCH) if one not in ELSEWHERE]
BEHIND_RENAME = ["image-renamed", "dump-committed", "epoch-noted", "dump-advanced"]
FIRST = ["dump-watching", "dump-watched"]
"""Only where nothing of the target is watched yet."""
ACTIONS = ["fail", "full", "kill"] if EVERY else ["fail", "kill"]
PROGRAMS = {
    "s_memory": "write",
    **({"s_threads": "respawn", "s_files": "write", "s_forked": "write"} if EVERY else {}),
}
IN_ROUNDS = DumpOptions(incremental=True, max_freeze_ms=0)
THROUGH_TWIN = DumpOptions(tracker="full", max_freeze_ms=0)


def still(pid):
    settle(pid)
    assert "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text()
    return view(pid)


PROMISE = "a target goes on, and its next delta is right, when a dump ends behind a step"


@attrs.define
class Steps:
    """A target that does nothing between its dumps, of which one step is the last."""

    target: Program
    step: str
    image: Path
    kept: Promise
    before: object = None

    def end_at(self, point, action):
        """Dump until there, and look at what that leaves."""
        what = f"{point}={action}"
        self.kept.try_once()
        pid = self.target.pid
        if point in FIRST:
            stop_watching(pid)
        assert self.target.ask(f"step {self.step}").startswith("stepped")
        self.before, n_before = still(pid), len(Chain.open(self.image).generations())
        ended = in_child(lambda: dump(pid, self.image, IN_ROUNDS), what)
        # That an epoch cannot be written is a warning: the next dump is full.
        assert ended == (0 if what == "epoch-noted=full" else ending_of(action)), what
        assert self.target.ask("check") == "ok", what
        if action != "kill":
            self._expect_nothing_left(what)
        n_more = len(Chain.open(self.image).generations()) - n_before
        assert n_more == (point in BEHIND_RENAME), what
        assert verify(Chain.open(self.image)) == [], what

    def go_on(self, what):
        """Dump to the end, and compare each page."""
        settle(self.target.pid)
        dump(self.target.pid, self.image, IN_ROUNDS)
        self._expect_nothing_left(what)
        assert n_keepers(self.target.pid) == 1, what
        assert compare_newest(self.image, self.target.pid) > 0

    def _expect_nothing_left(self, what):
        assert temporaries(self.image) == [], what
        assert find_leftovers(self.target.pid) == [], what
        assert still(self.target.pid) == self.before, what


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_dump_ends_behind_any_step(program, tmp_path, promise):
    image = tmp_path / "image"
    with Program(program, cwd=tmp_path) as target:
        settle_on_one_cpu(target.pid)
        dump(target.pid, image)
        steps = Steps(target, PROGRAMS[program], image, promise(PROMISE))
        for point in POINTS:
            for action in ACTIONS if EVERY or point in POINTS[::2] else ["kill"]:
                steps.end_at(point, action)
                if EVERY or action == "kill":
                    steps.go_on(f"{point}={action}")
        assert target.ask("check") == "ok"
    with Restored(image) as back:
        assert not lasting_differences(steps.before, back.pid)
        assert back.ask("check") == "ok"


def test_a_dump_through_a_twin_ends_behind_any_step(tmp_path):
    """The twin goes, too."""
    image = tmp_path / "image"
    points = ["dump-cloned", "dump-captured", "dump-armed", "dump-copied", "dump-thawed"]
    with Sweeper("--mib", "8", cwd=tmp_path) as target:
        dump(target.pid, image, THROUGH_TWIN)
        for point in points:
            for action in ACTIONS:
                assert target.ask("step") == "stepped"
                ended = in_child(
                    lambda: dump(target.pid, image, THROUGH_TWIN),
                    f"{point}={action}",
                )
                assert ended == ending_of(action)
                target.await_clones(ANSWER_S)
                target.expect_unharmed()
                assert target.ask("check") == "ok", f"{point}={action}"
        assert verify(Chain.open(image)) == []
        dump(target.pid, image, THROUGH_TWIN)
    with Restored(image) as back:
        assert back.ask("check") == "ok"


@pytest.mark.parametrize("point", ["dump-doomed", "dump-killed"])
def test_a_dump_that_kills_ends_behind_its_last_steps(point, tmp_path):
    """From the moment on that it is doomed, the target is only in the image."""
    image = tmp_path / "image"
    with Program("s_memory", cwd=tmp_path) as target:
        before = still(target.pid)
        options = DumpOptions(kill=True)
        assert in_child(lambda: dump(target.pid, image, options), f"{point}=kill") == KILLED
        assert target.process.wait(ANSWER_S) == KILLED
    assert verify(Chain.open(image)) == []
    with Restored(image) as back:
        assert not lasting_differences(before, back.pid)
        assert back.ask("check") == "ok"
