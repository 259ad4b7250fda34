"""The promise: a tree that is slowed runs on whenever it is let, and is let in the end."""

import contextlib
import itertools
import os
import random
import signal
import threading
import time

import pytest

from ckpt.engine.convergence import Budget
from ckpt.engine.dump import DumpOptions, dump
from ckpt.engine.throttle import slowed
from ckpt.errors import FreezeTimeout
from ckpt.kernel import ptrace
from ckpt.kernel.procfs import status
from ckpt.process.freezer import freeze_tree
from ckpt.units import Tid
from integration.harness import Restored
from integration.process.test_killed_tracer import let_pass, start
from integration.workloads.driver import Program

N_STOPS = 20
N_KILLS = 25
SHARES = [0.2, 0.8, 0.95]


class Stops:
    """Freezes a program, and knows when."""

    def __init__(self, pid):
        self.pid = pid
        self.times = []
        self.enough = threading.Event()

    @contextlib.contextmanager
    def freeze(self):
        began_s = time.monotonic()
        with freeze_tree(self.pid, ptrace.Option.NONE) as tree:
            yield tree
        self.times.append((began_s, time.monotonic()))
        if len(self.times) >= N_STOPS:
            self.enough.set()


def tracer_of(pid):
    return status.read_status(pid).tracer_pid


@pytest.mark.parametrize("share", SHARES)
def test_it_stands_for_its_share_at_most_and_works_in_between(share, tmp_path):
    with Program("writer", "--rate", "0", "--mib", "16", cwd=tmp_path) as work:
        stops = Stops(work.pid)
        with slowed(stops.freeze, share):
            assert stops.enough.wait(60)
            assert work.ask("step").startswith("stepped")
            assert work.ask("check") == "ok"
        for (began, ended), (again, _) in itertools.pairwise(stops.times):
            assert again - ended >= (ended - began) * (1 - share) / share * 0.9
        assert tracer_of(work.pid) == 0
        assert work.ask("check") == "ok"
        assert work.quit() == 0


def test_nobody_is_stopped_for_no_share():
    def freeze():
        raise AssertionError("stopped")

    with slowed(freeze, 0.0):
        assert threading.active_count() == 1


def test_a_stop_that_fails_is_tried_again():
    tried = threading.Semaphore(0)

    def freeze():
        tried.release()
        raise FreezeTimeout(Tid(1), 1.0)

    with slowed(freeze, 0.5):
        assert all(tried.acquire(timeout=60) for _ in range(3))


def test_a_program_that_ends_meanwhile_ends_nothing_else(tmp_path):
    with Program("writer", "--mib", "16", cwd=tmp_path) as work:
        stops = Stops(work.pid)
        with slowed(stops.freeze, 0.5):
            assert stops.enough.wait(60)
            assert work.quit() == 0


@pytest.mark.slow
def test_who_is_slowed_is_unharmed_when_the_slowing_is_killed(tmp_path):
    chance = random.Random("slowed")
    with Program("writer", "--rate", "0", "--mib", "16", cwd=tmp_path) as work:
        stops = Stops(work.pid)

        def slow():
            stops.times.clear()
            stops.enough.clear()
            with slowed(stops.freeze, 0.8):
                stops.enough.wait()

        for _ in range(N_KILLS):
            tracer = start(slow)
            let_pass(chance.uniform(0, 0.5))
            tracer.end(signal.SIGKILL)
            assert work.ask("step").startswith("stepped")
            assert work.ask("check") == "ok"
        assert tracer_of(work.pid) == 0


def test_rounds_of_a_slowed_program_are_those_of_any(tmp_path, monkeypatch):
    monkeypatch.setattr(Budget, "throttle", 0.9)
    image = tmp_path / "image"
    options = DumpOptions(incremental=True, tracker="writeprotect", max_freeze_ms=0)
    with Program("writer", "--rate", "0", "--mib", "32", cwd=tmp_path) as work:
        for _ in range(3):
            assert dump(work.pid, image, options).rounds
            assert work.ask("check") == "ok"
            assert work.ask("step").startswith("stepped")
        assert tracer_of(work.pid) == 0
    assert os.listdir(image)
    with Restored(image) as work:
        assert work.ask("check") == "ok"
        assert work.ask("step").startswith("stepped")
