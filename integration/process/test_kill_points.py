"""The promise: a kill between any two of our calls that make or remove an arena harms nobody.

A tracer runs its bursts call by call and ends itself by SIGKILL behind the k-th, for every k: while
the way back is written, while registers are set, at entry and exit of the call, when its own state
is there again.
"""

import ctypes
import os
import signal

import pytest

from ckpt.kernel import burst, ptrace
from ckpt.kernel.arch import NR, x86_64
from ckpt.kernel.procfs import maps
from ckpt.process.arena import arena
from ckpt.process.freezer import freeze
from ckpt.units import Pid
from integration.workloads.driver import Program

_FAR = 1000


def _end_behind(n_calls):
    """Have this process end behind its n-th call in a burst; asking who has stopped is none."""
    make = burst._runner()
    left = [n_calls]

    def make_and_count(start, end):
        for at in range(start, end, x86_64.CALL_SIZE):
            make(at, at + x86_64.CALL_SIZE)
            if ctypes.c_uint64.from_address(at).value != NR.waitid:
                left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    burst._runner = lambda: make_and_count
    return left


def map_and_unmap(pid, n_calls):
    """Do so in a child that ends behind its n-th call; return how many calls it had left."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with freeze(Pid(pid), ptrace.Option.NONE) as frozen:
                left = _end_behind(n_calls)
                with arena(Pid(pid), frozen.tgid, frozen.leader):
                    pass
                os.write(writer, str(left[0]).encode())
        finally:
            os._exit(1)
    os.close(writer)
    left = os.read(reader, 16)
    os.close(reader)
    os.waitpid(child, 0)
    return int(left or 0)


def count_arenas(pid):
    return sum(vma.perms == "rwxp" for vma in maps.read_maps(Pid(pid)))


PROGRAMS = [["s_signals"], ["s_threads"], ["writer", "--mib", "16", "--rate", "2000"]]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program[0])
def test_a_kill_behind_any_call_harms_nobody(program, tmp_path, promise):
    kept = promise("a target goes on when its tracer is killed between two calls of an arena")
    with Program(*program, cwd=tmp_path) as target:
        n_calls = _FAR - map_and_unmap(target.pid, _FAR)
        # Twice: a frame written, registers and mask set, let go on two times, all of it put back.
        assert n_calls > 16
        n_arenas = [0]
        for k in range(1, n_calls + 1):
            kept.try_once()
            map_and_unmap(target.pid, k)
            assert target.ask("check") == "ok", f"behind call {k} of {n_calls}"
            n_arenas.append(count_arenas(target.pid))
        left = [k for k in range(1, n_calls + 1) if n_arenas[k] > n_arenas[k - 1]]
        # From the moment it is told to map one until it is told to unmap it, in one piece.
        assert left == list(range(left[0], left[-1] + 1))
        assert 1 < left[0] < left[-1] < n_calls
        assert target.quit() == 0
