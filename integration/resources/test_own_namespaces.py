"""A program in namespaces of its own comes back into such ones, at any generation."""

import os

import pytest

from integration.harness import Restored, become_subreaper, dump
from integration.workloads.driver import Program

become_subreaper()
NAMES = ("uts", "ipc", "net")


def ours():
    return [os.readlink(f"/proc/thread-self/ns/{name}") for name in NAMES]


@pytest.mark.parametrize(
    "command", [("s_namespaces",), ("s_namespaces", "down"), ("s_sysv", "own")], ids=" ".join
)
def test_the_workload_comes_back(command, tmp_path):
    image = tmp_path / "image"
    with Program(*command, cwd=tmp_path) as work:
        dump(work.pid, image)
        assert work.ask("step") == "stepped"
        assert dump(work.pid, image)["kind"] == "delta"
        assert work.ask("check") == "ok"
    for generation in (1, 0):
        with Restored(image, "--at", str(generation)) as work:
            assert work.ask("check") == "ok"
            there = [os.readlink(f"/proc/{work.pid}/ns/{name}") for name in NAMES]
            own = ("ipc",) if command[0] == "s_sysv" else NAMES
            assert [name for name in NAMES if there[NAMES.index(name)] not in ours()] == list(own)
