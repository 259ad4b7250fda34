"""The promise: what a killed ckpt has left behind the next dump removes, and nothing else."""

import ctypes
import mmap
import os
import signal
from pathlib import Path

from ckpt.kernel import ptrace
from ckpt.kernel.arch import x86_64 as arch
from ckpt.process.arena import ARENA_SIZE, arena
from ckpt.process.freezer import freeze
from ckpt.process.leftovers import find_leftovers, remove_leftovers
from ckpt.units import Pid
from integration.freezer.targets import child
from integration.harness import dump
from integration.workloads.driver import Program

_INSIDE = 512
_JUMP_TO_ITSELF = bytes.fromhex("ebfe")


def leave_an_arena(pid):
    """Have a tracer map an arena in a process, then kill it."""
    tracer = os.fork()
    if tracer == 0:
        try:
            with (
                freeze(Pid(pid), ptrace.Option.NONE) as frozen,
                arena(Pid(pid), frozen.tgid, frozen.leader),
            ):
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(tracer, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def mappings_of(pid):
    return [line.split()[:2] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]


def test_the_next_dump_removes_what_killed_ones_have_left(tmp_path):
    with Program("s_signals", cwd=tmp_path) as target:
        assert target.ask("check") == "ok"
        before = mappings_of(target.pid)
        for _ in range(3):
            leave_an_arena(target.pid)
        assert len(find_leftovers(Pid(target.pid))) == 3
        assert target.ask("check") == "ok"
        dump(target.pid, tmp_path / "image")
        assert mappings_of(target.pid) == before
        assert target.ask("check") == "ok"
        assert target.quit() == 0


def _map_alike(code):
    memory = mmap.mmap(-1, ARENA_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    memory[: len(code)] = code
    _kept.append(memory)
    return memory


_kept = []


def clear(pid):
    with freeze(Pid(pid), ptrace.Option.NONE) as frozen:
        remove_leftovers([frozen])


def test_memory_that_only_looks_alike_stays():
    other = arch.BATCH_CODE[:-1] + b"\0"
    with child(lambda: (_map_alike(other), _map_alike(b""))) as pid:
        before = mappings_of(pid)
        assert find_leftovers(Pid(pid)) == []
        clear(pid)
        assert mappings_of(pid) == before


def _run_inside():
    """Be a thread that goes on, without its tracer, in what that has left."""
    memory = _map_alike(arch.BATCH_CODE)
    memory[_INSIDE : _INSIDE + len(_JUMP_TO_ITSELF)] = _JUMP_TO_ITSELF


def _jump_in():
    start = ctypes.addressof(ctypes.c_char.from_buffer(_kept[-1]))
    ctypes.CFUNCTYPE(None)(start + _INSIDE)()


def test_one_in_which_a_thread_still_runs_stays():
    with child(_run_inside, _jump_in) as pid:
        (span,) = find_leftovers(Pid(pid))
        while not is_inside(pid, span):
            os.sched_yield()
        clear(pid)
        assert find_leftovers(Pid(pid)) == [span]


def is_inside(pid, span):
    with freeze(Pid(pid), ptrace.Option.NONE) as frozen:
        return int(frozen.leader.registers.rip) in span
