"""Two processes that share files: full, three deltas, kill, restore the newest and an older one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.harness import Restored, become_subreaper, dump
from integration.procview import lasting_differences, view
from integration.workloads.driver import Program

TRACKERS = ["writeprotect", "compare", "full"]
DAMAGES = ["offset", "flag", "pidfd", "ticks"]
become_subreaper()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.contextmanager
def orphans_reaped(pids: list[int]) -> Iterator[None]:
    """Reap the children of a program that is killed in the block: they end with it."""
    yield
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_family_comes_back(tracker: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(Program("s_family", cwd=tmp_path))
        both = [work.pid, *children(work.pid)]
        assert len(both) == 2
        stack.enter_context(orphans_reaped(both[1:]))
        stack.push(work.__exit__)
        dump(work.pid, image, "--tracker", tracker)
        for _ in range(3):
            assert work.ask("step toggle") == "stepped"
            assert work.ask("check") == "ok"
            result = dump(work.pid, image, "--tracker", tracker)
            assert result["kind"] == ("full" if tracker == "full" else "delta"), result["reason"]
        before = {pid: view(pid) for pid in both}
        assert work.ask("check") == "ok", "the dumps have changed the living"
    with orphans_reaped(both[1:]), Restored(image) as work:
        for pid in both:
            assert not lasting_differences(before[pid], pid)
        assert work.ask("check") == "ok"
        assert work.ask("step toggle") == "stepped"
        assert dump(work.pid, image, "--tracker", tracker)["kind"] == result["kind"]
        assert work.ask("check") == "ok"
        assert work.quit() == 0
    with orphans_reaped(both[1:]), Restored(image, "--at", "1") as work:
        assert work.ask("check") == "ok"


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_family_notices_each_damage(damage: str, tmp_path: Path) -> None:
    with Program("s_family", cwd=tmp_path) as work:
        assert work.ask("check") == "ok"
        assert work.ask(f"corrupt {damage}") == "corrupted"
        assert work.ask("check").startswith("FAIL ")
        assert work.quit() == 1
