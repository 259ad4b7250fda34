"""Unix sockets between the processes of a tree, under every tracker."""

import contextlib
import os
from pathlib import Path

import pytest

from integration.harness import Restored, become_subreaper, dump
from integration.workloads.driver import Program

TRACKERS = ["writeprotect", "compare", "full"]
become_subreaper()


def reap_orphans() -> None:
    """Wait for what the end of a tree has left to us: their numbers are wanted again."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_sockets_of_a_tree_come_back(tracker: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with Program("s_unix_tree", cwd=tmp_path) as work:
        dump(work.pid, image, "--tracker", tracker)
        assert work.ask("check") == "ok", "the dump has changed the living"
        for _ in range(2):
            assert work.ask("step change").startswith("stepped")
            dump(work.pid, image, "--tracker", tracker)
        assert work.ask("check") == "ok"
    reap_orphans()
    with Restored(image) as work:
        assert work.ask("check") == "ok"
        assert work.ask("step change").startswith("stepped")
        dump(work.pid, image, "--tracker", tracker)
        assert work.ask("check") == "ok"
        assert work.quit() == 0
    reap_orphans()
    with Restored(image, "--at", "1") as work:
        assert work.ask("check") == "ok"
        assert work.ask("check") == "ok"
    reap_orphans()
