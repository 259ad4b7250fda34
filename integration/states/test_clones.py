"""Processes that clone() made to share descriptors, directories, memory: they share them again."""

import contextlib
import os
from pathlib import Path

import pytest

from ckpt.process.clones import Clones, Shares
from ckpt.units import Pid
from integration.harness import Restored, become_subreaper, dump
from integration.procview import lasting_differences, view
from integration.states.test_family import orphans_reaped
from integration.trees.test_trees import places
from integration.workloads.driver import Program

TRACKERS = ["writeprotect", "compare", "full"]
KIDS = {
    "plain": ["files", "fs", "both", "sibling"],
    "memory": ["files", "memory", "handlers", "all"],
}
DAMAGES = ["files", "fs", "mask", "handler", "closed"]
become_subreaper()


def shares(root: int) -> dict[Pid, dict[str, int]]:
    """Return what each process has of which other one."""
    pids = [Pid(pid) for pid in places(root)]
    found = Clones(pids).confirm(pids)
    return {pid: {what.value: owner for what, owner in one.items()} for pid, one in found.items()}


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("kids", KIDS)
def test_what_is_shared_stays_shared(kids: str, tracker: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(Program("s_clones", *KIDS[kids], cwd=tmp_path))
        stood = places(work.pid)
        assert len(stood) == 1 + len(KIDS[kids])
        others = sorted(set(stood) - {work.pid})
        shared = shares(work.pid)
        assert sorted(shared) == others
        stack.enter_context(orphans_reaped(others))
        stack.push(work.__exit__)
        dump(work.pid, image, "--tracker", tracker)
        for _ in range(3):
            assert work.ask("step change") == "stepped"
            assert work.ask("check") == "ok"
            result = dump(work.pid, image, "--tracker", tracker)
            assert result["kind"] == ("full" if tracker == "full" else "delta"), result["reason"]
        before = {pid: view(pid) for pid in stood}
        assert work.ask("check") == "ok", "the dumps have changed the living"
    with orphans_reaped(others), Restored(image) as work:
        assert places(work.pid) == stood
        assert shares(work.pid) == shared
        for pid in stood:
            assert not lasting_differences(before[pid], pid)
        assert work.ask("check") == "ok"
        assert work.ask("step change") == "stepped"
        assert dump(work.pid, image, "--tracker", tracker)["kind"] == result["kind"]
        assert work.ask("check") == "ok"
        assert work.quit() == 0
    with orphans_reaped(others), Restored(image, "--at", "1") as work:
        assert shares(work.pid) == shared
        assert work.ask("check") == "ok"
        assert os.readlink(f"/proc/{work.pid}/cwd").endswith(".d")


@pytest.mark.parametrize("options", [("--lazy",), ()])
def test_shared_memory_comes_back_from_a_clone_and_before_it_is_there(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    image = tmp_path / "image"
    with Program("s_clones", *KIDS["memory"], cwd=tmp_path) as work:
        others = sorted(set(places(work.pid)) - {work.pid})
        shared = shares(work.pid)
        # No time for copying: it is read out of a clone.
        dump(work.pid, image, "--tracker", "full", "--max-freeze", "0")
        assert work.ask("check") == "ok"
        assert work.quit() == 0
    with orphans_reaped(others), Restored(image, *options) as work:
        assert shares(work.pid) == shared
        assert work.ask("check") == "ok"
        assert work.ask("step change") == "stepped"
        assert work.ask("check") == "ok"


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_clones_notice_each_damage(damage: str, tmp_path: Path) -> None:
    with Program("s_clones", cwd=tmp_path) as work:
        assert work.ask("check") == "ok"
        assert work.ask(f"corrupt {damage}") == "corrupted"
        assert work.ask("check").startswith("FAIL ")
        assert work.quit() == 1


def test_what_is_shared_is_found_as_it_is_now(tmp_path: Path) -> None:
    with Program("s_clones", cwd=tmp_path) as work:
        pids = [Pid(pid) for pid in places(work.pid)]
        root, files, fs, both, sibling = pids
        found = Clones(pids)
        assert found.confirm(pids) == {
            files: Shares(files=root),
            fs: Shares(directories=root),
            both: Shares(files=root, directories=root),
            sibling: Shares(files=root),
        }
        # The first of those that are asked for counts.
        assert found.confirm([files, both, sibling]) == {
            both: Shares(files=files),
            sibling: Shares(files=files),
        }
        assert Clones([both]).confirm([fs, both]) == {both: Shares(directories=fs)}
        assert work.ask("corrupt files") == "corrupted"
        assert files not in found.confirm(pids)
        assert found.confirm(pids)[sibling] == Shares(files=root)
