"""What comes back with all its memory comes back without it, too."""

from pathlib import Path

import pytest

from integration.harness import Restored, become_subreaper, dump
from integration.lazy.behind import wait_until_filled
from integration.procview import lasting_differences, view
from integration.states.test_states import steps_of, take
from integration.workloads.catalog import STATES
from integration.workloads.driver import Program

become_subreaper()


@pytest.mark.parametrize("program", sorted(STATES))
def test_a_state_comes_back_before_its_memory(program: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    steps = steps_of(program)
    with Program(program, cwd=tmp_path) as work:
        dump(work.pid, image)
        take(work, steps[0] if steps else None)
        dump(work.pid, image)
        before = view(work.pid)
    with Restored(image, "--lazy") as work:
        assert work.ask("check") == "ok"
        take(work, steps[0] if steps else None)
        assert work.ask("check") == "ok"
    with Restored(image, "--lazy") as work:
        wait_until_filled(work.process.pid)
        assert not lasting_differences(before, work.pid)
        assert work.ask("check") == "ok"
        take(work, steps[0] if steps else None)
        made = dump(work.pid, image)
        # What is small is not left for later, and then the tracker is armed at once.
        was_lazy = any("the restore is lazy" in warning for warning in work.said["warnings"])
        assert (made["generation"], made["kind"]) == (2, "full" if was_lazy else "delta")
    with Restored(image) as work:
        assert work.ask("check") == "ok"


def test_a_writer_that_does_everything_finds_all_its_memory(tmp_path: Path) -> None:
    image = tmp_path / "image"
    arguments = ["--mib", "64", "--threads", "4", "--rate", "0", "--ops", "all"]
    with Program("writer", *arguments, cwd=tmp_path) as work:
        assert work.ask("step") == "stepped"
        assert work.ask("pause") == "paused"
        dump(work.pid, image)
        assert work.ask("resume") == "resumed"
        assert work.ask("step") == "stepped"
        assert work.ask("pause") == "paused"
        dump(work.pid, image)
    for _ in range(3):
        with Restored(image, "--lazy") as work:
            assert work.ask("resume") == "resumed"
            for _ in range(3):
                assert work.ask("step") == "stepped"
                assert work.ask("check") == "ok"
            wait_until_filled(work.process.pid)
            assert work.ask("step") == "stepped"
            assert work.ask("check") == "ok"
