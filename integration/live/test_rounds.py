"""The promise: whatever a target does while it is copied, the image is of the moment it stands."""

import errno
import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from ckpt.engine.dump import DumpOptions, dump
from ckpt.errors import CkptError, TargetGone
from ckpt.image.chain import Chain
from ckpt.image.verify import verify
from integration.harness import CKPT, Restored
from integration.live.moments import Moment, at
from integration.live.sweeping import Sweeper
from integration.workloads.catalog import TRACKER_CASES
from integration.workloads.driver import Program

IN_ROUNDS = DumpOptions(incremental=True, tracker="writeprotect", max_freeze_ms=0)
CASES = ["t_dontneed", "t_exec", "t_file_private", "t_fork", "t_mremap", "t_remap_same", "t_thp"]


def expect_ok(image, n_generations):
    for generation in range(n_generations):
        with Restored(image, "--at", str(generation)) as work:
            assert work.ask("check") == "ok", f"generation {generation}"
            assert work.ask("step") == "stepped"
            assert work.ask("check") == "ok", f"generation {generation}"


@pytest.mark.parametrize(
    "moment", [Moment.WATCHING, Moment.ROUND, Moment.COLLECTING, Moment.COPYING]
)
@pytest.mark.parametrize("case", CASES)
def test_memory_changes_shape_in_a_round(case, moment, tmp_path):
    image = tmp_path / "image"
    with Program("tracker_cases", case, cwd=tmp_path) as work:

        def step(name):
            assert work.ask(f"step {name}") == "stepped"

        for name in TRACKER_CASES[case]:
            with at(moment, 1, partial(step, name)) as calls:
                dump(work.pid, image, IN_ROUNDS)
            if not calls[0]:
                # So little was written that no round was worth it.
                step(name)
                dump(work.pid, image, IN_ROUNDS)
            assert work.ask("check") == "ok"
        n_generations = len(Chain.open(image).generations())
    expect_ok(image, n_generations)


def test_a_mapping_that_moved_and_grew_in_a_round_stays_one(tmp_path):
    """Whoever watches a part of it splits it, and it cannot be moved any more."""
    with Program("tracker_cases", "t_mremap", cwd=tmp_path) as work:

        def step(name):
            assert work.ask(f"step {name}") == "stepped"

        for _ in range(4):
            with (
                at(Moment.ROUND, 1, lambda: step("move")) as rounds,
                at(Moment.COLLECTING, 1, lambda: step("grow")),
            ):
                dump(work.pid, tmp_path / "image", DumpOptions(max_freeze_ms=0))
            assert rounds[0]
            step("move")
            step("shrink")
        assert work.ask("check") == "ok"


@pytest.mark.parametrize("moment", [Moment.ROUND, Moment.COLLECTING, Moment.COPYING])
@pytest.mark.parametrize("turn", [1, 2])
def test_a_target_that_ends_in_a_round_leaves_no_generation(moment, turn, tmp_path):
    image = tmp_path / "image"
    with Sweeper("--mib", "32", cwd=tmp_path) as work:
        assert work.ask("step") == "stepped"

        def end():
            work.process.kill()
            work.process.wait()

        with at(moment, turn, end), pytest.raises(TargetGone) as told:
            dump(work.pid, image, IN_ROUNDS)
        assert str(work.pid) in str(told.value)
    assert not image.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system that holds one generation of 32 MiB, and not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)]
    subprocess.run(mount, check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_dump_that_finds_the_disk_full_in_a_round_is_not_believed(small_disk, tmp_path):
    image, other = small_disk / "image", small_disk / "other"
    with Sweeper("--mib", "32", cwd=tmp_path) as work:
        dump(work.pid, image, IN_ROUNDS)
        assert work.ask("step") == "stepped"
        with pytest.raises((CkptError, OSError)) as told:
            dump(work.pid, image, IN_ROUNDS)
        assert os.strerror(errno.ENOSPC) in str(told.value)
        assert verify(Chain.open(image)) == []
        assert len(Chain.open(image).generations()) == 1
        assert not other.exists()
        subprocess.run(["mount", "-o", "remount,size=1g", str(small_disk)], check=True)
        again = dump(work.pid, image, IN_ROUNDS)
        assert (again.kind, bool(again.reason)) == ("full", True)
        assert work.ask("check") == "ok"
        assert work.ask("step") == "stepped"
        assert dump(work.pid, image, IN_ROUNDS).kind == "delta"
    expect_ok(image, 3)


def test_a_target_that_ends_after_the_thaw_is_in_the_image(tmp_path):
    image = tmp_path / "image"
    with Sweeper("--mib", "32", cwd=tmp_path) as work:
        with at(Moment.COMMITTING, 1, lambda: os.kill(work.pid, signal.SIGKILL)):
            dump(work.pid, image, IN_ROUNDS)
        work.process.wait()
    expect_ok(image, 1)


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Tells the peak memory of a command in KiB: what it is started by counts too, so not by pytest."""


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["writeprotect", "full"])
def test_memory_of_a_dump_does_not_grow_with_the_target(tracker, tmp_path):
    """Through rounds, and through a twin."""
    with Sweeper("--mib", "1024", cwd=tmp_path) as work:
        options = ["--tracker", tracker, "--max-freeze", "0", "--json"]
        command = [*CKPT, "dump", "--pid", str(work.pid), *options, str(tmp_path / "image")]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *command], capture_output=True, text=True, check=True
        )
        peak_kib = int(done.stdout.splitlines()[-1])
        print(f"{peak_kib >> 10} MiB")
        assert peak_kib < 200 << 10
        work.expect_unharmed()
