"""A process that goes on without its first thread comes back as such."""

import contextlib
from pathlib import Path

import pytest

from ckpt.kernel.procfs.stat import read_stat
from ckpt.process.tree import reachable_as
from ckpt.units import Pid
from integration.harness import Restored, become_subreaper, dump
from integration.procview import lasting_differences, view
from integration.states.test_family import orphans_reaped
from integration.trees.test_trees import places
from integration.workloads.driver import Program

TRACKERS = ["writeprotect", "compare", "full"]
ARGUMENTS: dict[str, list[str]] = {"root": [], "kid": ["kid"]}
STATUS = 5
become_subreaper()


def without_first_thread(root: int) -> list[int]:
    return [pid for pid in places(root) if reachable_as(Pid(pid)) != pid]


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("where", ARGUMENTS)
def test_it_goes_on_without_its_first_thread(where: str, tracker: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(Program("s_leader", *ARGUMENTS[where], cwd=tmp_path))
        stood = places(work.pid)
        (it,) = without_first_thread(work.pid)
        assert (it == work.pid) == (where == "root")
        others = sorted(set(stood) - {work.pid})
        stack.enter_context(orphans_reaped(others))
        stack.push(work.__exit__)
        dump(work.pid, image, "--tracker", tracker)
        for step in ("count", "bear", "count"):
            assert work.ask(f"step {step}") == "stepped"
            result = dump(work.pid, image, "--tracker", tracker)
            assert result["kind"] == ("full" if tracker == "full" else "delta"), result["reason"]
        before = {pid: view(reachable_as(Pid(pid))) for pid in stood}
        assert work.ask("check") == "ok", "the dumps have changed the living"
    with orphans_reaped(others), Restored(image) as work:
        assert places(work.pid) == stood
        assert read_stat(Pid(it)).state == "Z"
        for pid in stood:
            assert not lasting_differences(before[pid], reachable_as(Pid(pid)))
        assert work.ask("check") == "ok"
        assert work.ask("step count") == "stepped"
        assert dump(work.pid, image, "--tracker", tracker)["kind"] == result["kind"]
        assert work.ask("check") == "ok"
        assert work.quit() == STATUS
    with orphans_reaped(others), Restored(image, "--at", "1") as work:
        assert work.ask("check") == "ok"


@pytest.mark.parametrize("damage", ["count", "offset"])
def test_it_notices_each_damage(damage: str, tmp_path: Path) -> None:
    with Program("s_leader", cwd=tmp_path) as work:
        assert work.ask("check") == "ok"
        assert work.ask(f"corrupt {damage}") == "corrupted"
        assert work.ask("check").startswith("FAIL ")
        assert work.quit() == 1
