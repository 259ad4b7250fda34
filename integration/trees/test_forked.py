"""Memory that a fork shares until it is written: each process has its own, and it stays shared."""

import pytest

from integration.harness import Restored, become_subreaper, dump
from integration.procview import lasting_differences, view
from integration.workloads.driver import Program, descendants

TRACKERS = ["writeprotect", "compare", "full"]
become_subreaper()


def tree(pid):
    return sorted({pid, *descendants(pid)})


@pytest.mark.parametrize("tracker", TRACKERS)
def test_each_process_of_a_tree_has_its_own_memory_back(tracker, tmp_path):
    image = tmp_path / "image"
    with Program("s_forked", cwd=tmp_path) as work:
        pids = tree(work.pid)
        assert len(pids) == 4
        dump(work.pid, image, "--tracker", tracker)
        for step in ("write", "drop", "write"):
            assert work.ask(f"step {step}") == "stepped"
            dump(work.pid, image, "--tracker", tracker)
        before = {pid: view(pid) for pid in pids}
        assert work.ask("check") == "ok"
    for options in ((), ("--at", "2"), ("--at", "0")):
        with Restored(image, *options) as work:
            if not options:
                for pid in pids:
                    assert not lasting_differences(before[pid], pid)
            assert work.ask("check") == "ok"
            assert work.ask("step drop") == "stepped"
            assert work.ask("check") == "ok"
            assert work.quit() == 0
