"""The promise: whenever we are killed while a target stands still, it goes on as if nothing was.

What is not held, and is known:

- The single system calls that map and unmap the arena, in a target that has no way back from them
  (`way_back.py`: its first thread is not on the main stack, its code lacks two instructions). If we
  are killed in the middle of one, it goes astray. The targets here have one; `test_kill_points.py`
  goes through these calls step by step.
- Killed while batches run or between them, we leave the arena mapped: nobody is there to remove it.
- A call that no stop lets go on (epoll_wait, sigtimedwait, ...; signal(7)) ends with EINTR, as the
  kernel has it when any tracer lets go; a timeout that was running may begin anew.

SIGINT, SIGTERM and SIGHUP wait for the end of such steps, so of them nothing of this is true.
"""

import gc
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import attrs
import pytest

from ckpt.engine.dump import DumpOptions, dump
from ckpt.image.chain import Chain
from ckpt.image.verify import verify
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.process.arena import arena
from ckpt.process.freezer import freeze
from ckpt.process.remote import call
from ckpt.units import Pid
from integration.harness import Restored, become_subreaper
from integration.workloads.driver import Program

N_KILLS = int(os.environ.get("CKPT_KILLS", "64"))
"""Of each program; of a dump, which takes longer, two of five."""
LONGEST_S = 0.03
LOST = 99
CALLS = [call(NR.getpid)] * 200


@attrs.define
class Tracer:
    """A fork of ours that works on a target until it is ended."""

    pid: int

    def end(self, sig):
        os.kill(self.pid, sig)
        _, status = os.waitpid(self.pid, 0)
        assert os.waitstatus_to_exitcode(status) != LOST, "an interrupt came where Python drops it"


def lose(unraisable):
    """Say where an interrupt was dropped, and end."""
    if isinstance(unraisable.exc_value, Exception):
        return  # a warning that something was not closed, if the interrupt came before its block
    os.write(2, f"{unraisable.err_msg}: {unraisable.object!r}\n".encode())
    traceback.print_tb(unraisable.exc_traceback)
    os._exit(LOST)


def start(work):
    """Fork a tracer that does `work` over and over; it has done the first round."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = lose
            # Of other tests' libraries: an interrupt that comes in one of these, or in a finalizer
            # of what they have left for the collector, is dropped, too.
            gc.callbacks.clear()
            gc.freeze()
            work()
            os.write(writer, b"x")
            while True:
                work()
        finally:
            os._exit(1)
    os.close(writer)
    first = os.read(reader, 1)
    os.close(reader)
    assert first == b"x", "the tracer could not do its work even once"
    return Tracer(pid)


def stop_and_call(pid):
    """Freeze a process, run several batches on each of its threads, let it go."""
    with (
        freeze(Pid(pid), ptrace.Option.NONE) as frozen,
        arena(Pid(pid), frozen.tgid, frozen.leader) as lent,
    ):
        for _ in range(3):
            for task in frozen.tasks.values():
                lent.run(task, CALLS)


def let_pass(seconds):
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        os.sched_yield()


def maps_of(pid):
    return Path(f"/proc/{pid}/maps").read_text()


def arenas_in(before, after):
    """Return how many mappings there are now that there were not."""
    return len(set(after.splitlines()) - set(before.splitlines()))


PROGRAMS = [
    ["s_registers"],
    ["s_signals"],
    ["s_threads"],
    ["writer", "--mib", "16", "--rate", "2000"],
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_a_target_is_unharmed_when_its_tracer_is_killed(program, tmp_path, promise):
    kept = promise("a target goes on whenever its tracer is killed")
    chance = random.Random(program[0])
    with Program(*program, cwd=tmp_path) as target:
        for n_before in range(N_KILLS):
            kept.try_once()
            tracer = start(lambda: stop_and_call(target.pid))
            let_pass(chance.uniform(0, LONGEST_S))
            tracer.end(signal.SIGKILL)
            assert target.ask("check") == "ok", f"kill {n_before}"
        assert target.quit() == 0


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("program", ["s_registers", "s_threads"])
def test_a_signal_of_the_user_waits_until_nothing_of_us_is_left(program, sig, tmp_path):
    chance = random.Random(program)
    with Program(program, cwd=tmp_path) as target:
        before = maps_of(target.pid)
        for _ in range(20):
            tracer = start(lambda: stop_and_call(target.pid))
            let_pass(chance.uniform(0, LONGEST_S))
            tracer.end(sig)
            assert target.ask("check") == "ok"
            assert maps_of(target.pid) == before
        assert target.quit() == 0


def test_a_target_and_a_chain_are_unharmed_when_a_dump_is_killed(tmp_path, promise):
    """At any moment: the chain is whole, and the next dump, whatever it is based on, right."""
    kept = promise("a target goes on, and its chain is whole, whenever a dump is killed")
    become_subreaper()
    chance = random.Random("dump")
    image = tmp_path / "image"
    incremental = DumpOptions(incremental=True)
    n_kills = N_KILLS * 2 // 5
    with Program("writer", "--mib", "16", "--rate", "2000", cwd=tmp_path) as target:
        dump(target.pid, image)
        for n_before in range(n_kills):
            kept.try_once()
            tracer = start(lambda: dump(target.pid, image, incremental))
            let_pass(chance.uniform(0, 5 * LONGEST_S))
            tracer.end(signal.SIGKILL)
            assert target.ask("check") == "ok", f"kill {n_before}"
        assert verify(Chain.open(image)) == []
        dump(target.pid, image, incremental)
    with Restored(image) as target:
        assert target.ask("check") == "ok"


def test_an_arena_is_all_that_a_killed_tracer_leaves(tmp_path):
    """Neither a descriptor nor a thread nor a blocked signal, and at most one mapping each."""
    chance = random.Random("arena")
    with Program("s_registers", cwd=tmp_path) as target:
        seen = status_of(target.pid)
        n_arenas = 0
        for _ in range(10):
            before = maps_of(target.pid)
            tracer = start(lambda: stop_and_call(target.pid))
            let_pass(chance.uniform(0, LONGEST_S))
            tracer.end(signal.SIGKILL)
            assert target.ask("check") == "ok"
            left = arenas_in(before, maps_of(target.pid))
            # One arena is two mappings, of code and of data; neighbours may have become one.
            assert left <= 2
            n_arenas += bool(left)
            assert status_of(target.pid) == seen
        assert n_arenas <= 10


def status_of(pid):
    """Return what must stay of every thread, and which descriptors there are."""
    names = ("SigBlk", "SigIgn", "SigCgt", "TracerPid", "Threads", "Seccomp")
    threads = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        threads[task.name] = [line for line in lines if line.startswith(names)]
    return threads, sorted(os.listdir(f"/proc/{pid}/fd"))
