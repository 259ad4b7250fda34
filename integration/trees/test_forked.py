"""Memory that a fork shares until it is written: each process has its own, and it stays shared."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration.harness import Restored, become_subreaper, dump
from integration.procview import lasting_differences, view
from integration.workloads.driver import Program, descendants, end_orphans

MIB = 1 << 20
BULK = """
import mmap, os, signal, sys
bulk = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, 64 << 20, 1 << 20):
    bulk[at : at + (1 << 20)] = os.urandom(1 << 20)
def fork(*_):
    if os.fork() == 0:
        while True:
            signal.pause()
    print("ready", flush=True)
signal.signal(signal.SIGUSR1, fork)
for _ in range(int(sys.argv[1])):
    fork()
while True:
    signal.pause()
"""
TRACKERS = ["writeprotect", "compare", "full"]
become_subreaper()


def bulk_tree(n_children):
    """Start a process with 64 MiB that do not compress, and children of it."""
    return subprocess.Popen(
        [sys.executable, "-S", "-c", BULK, str(n_children)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )


@contextlib.contextmanager
def ended(process):
    """End a process, and its descendants, after the block."""
    try:
        yield process
    finally:
        family = descendants(process.pid)
        process.kill()
        process.wait()
        end_orphans(family)
        process.stdout.close()


def pss_bytes(pids):
    """Return what the processes have of memory, what they share counted once."""
    lines = [
        line.split()
        for pid in pids
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    ]
    return sum(int(words[1]) << 10 for words in lines if words[0] == "Pss_Anon:")


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


@pytest.mark.parametrize("tracker", TRACKERS)
def test_what_was_shared_until_written_is_so_again(tracker, tmp_path):
    image = tmp_path / "image"
    with ended(bulk_tree(3)) as process:
        for _ in range(3):
            assert process.stdout.readline() == b"ready\n"
        pids = tree(process.pid)
        before = pss_bytes(pids)
        assert before < 80 * MIB
        made = dump(process.pid, image, "--tracker", tracker)
        assert made["bytes"] < 72 * MIB
        # Nor does it cost the living anything.
        assert pss_bytes(pids) < before + 4 * MIB
    with Restored(image):
        assert pss_bytes(pids) < before + 4 * MIB
        dump(pids[0], image, "--tracker", tracker)
        assert pss_bytes(pids) < before + 4 * MIB
    with Restored(image):
        assert pss_bytes(pids) < before + 4 * MIB


def test_a_child_that_is_new_in_a_delta_shares_too(tmp_path):
    image = tmp_path / "image"
    with ended(bulk_tree(1)) as process:
        assert process.stdout.readline() == b"ready\n"
        dump(process.pid, image)
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == b"ready\n"
        pids = tree(process.pid)
        assert len(pids) == 3
        before = pss_bytes(pids)
        made = dump(process.pid, image)
        assert (made["kind"], made["bytes"] < 72 * MIB) == ("delta", True)
    with Restored(image):
        assert pss_bytes(pids) < before + 4 * MIB


@pytest.mark.parametrize("options", [("--max-freeze", "0.2"), ("--max-freeze", "1000")])
def test_what_is_written_while_it_is_dumped_is_nobody_elses(options, tmp_path):
    image = tmp_path / "image"
    with Program("s_sweepers", cwd=tmp_path) as work:
        for _ in range(6):
            dump(work.pid, image, *options)
        assert work.ask("check") == "ok"
    for number in range(6):
        with Restored(image, "--at", str(number)) as work:
            assert work.ask("check") == "ok"
