"""Every state program under every tracker: full, three deltas, kill, restore the newest and older.

What the programs ask the kernel they compare themselves; /proc is compared here.
"""

from pathlib import Path

import pytest

from integration.harness import Restored, become_subreaper, dump
from integration.procview import lasting_differences, view
from integration.trackers import warm
from integration.workloads.catalog import STATES
from integration.workloads.driver import Dialogue, Program

TRACKERS = ["writeprotect", "compare", "full"]
become_subreaper()

# Files that a step writes differ from what an older generation knew; the newest must fit.
WRITES_FILES = {
    ("s_files", "log"),
    ("s_files", "write"),
    ("s_memory", "shared"),
    ("s_memory", "write"),
}


def steps_of(program: str) -> list[str]:
    return [step for step in STATES[program] if (program, step) not in WRITES_FILES]


def take(work: Dialogue, step: str | None) -> None:
    if step is not None:
        assert work.ask(f"step {step}").startswith("stepped")


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("program", sorted(STATES))
def test_state_comes_back(program: str, tracker: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    steps = steps_of(program)
    with Program(program, cwd=tmp_path) as work:
        dump(work.pid, image, "--tracker", tracker)
        for number in range(3):
            take(work, steps[number % len(steps)] if steps else None)
            result = warm.dump(work.pid, image, tracker)
            assert result.kind == ("full" if tracker == "full" else "delta"), result.reason
        before = view(work.pid)
        assert work.ask("check") == "ok", "the dumps have changed the living"
    with Restored(image) as work:
        assert not lasting_differences(before, work.pid)
        assert work.ask("check") == "ok"
        take(work, steps[0] if steps else None)
        assert dump(work.pid, image, "--tracker", tracker)["kind"] == result.kind
        assert work.ask("check") == "ok"
        assert work.quit() == 0
    with Restored(image, "--at", "1") as work:
        assert work.ask("check") == "ok"
