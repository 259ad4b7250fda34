"""The promise: our programs have their names, and none takes a number that a restore wants."""

import contextlib
import os
import signal
from pathlib import Path

from ckpt.engine.layout import choose_arena
from ckpt.errors import PidTaken
from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import Prctl
from ckpt.process import programs, seed
from ckpt.process.keeper import start_keeper, stop_keeper
from ckpt.process.remote import Out, call
from ckpt.units import Fd, Pid
from integration.errors.refusals import children

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def free_number():
    """Return the number of a process that has just ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return Pid(pid)


def name_of(pid):
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_the_keeper_has_its_name():
    """It is the last thing that it does before it sleeps: wait for that in its system call."""
    with open(os.devnull) as held:
        keeper = start_keeper(Pid(os.getpid()), Fd(held.fileno()))
    try:
        syscall = Path(f"/proc/{keeper.pid}/syscall")
        while not syscall.read_text().startswith("7 "):
            os.sched_yield()
        assert name_of(keeper.pid) == "ckpt-keeper"
    finally:
        stop_keeper(keeper)


def parent_death_signal(embryo):
    (reply,) = embryo.run_checked("asking", [call(NR.prctl, Prctl.GET_PDEATHSIG, Out(4))])
    return int.from_bytes(reply.outs[0], "little")


def test_the_embryo_does_not_die_with_us():
    """The seed does, by a signal that a fork does not inherit (copy_process in kernel/fork.c)."""
    wanted = free_number()
    with seed.plant(wanted, {}, None, choose_arena([])) as nursery:
        embryo = nursery.root
        assert embryo.pid == wanted
        assert parent_death_signal(embryo) == 0
        end(embryo)


def end(embryo):
    os.kill(embryo.pid, signal.SIGKILL)
    seed.see_off(embryo.leader.tid)


def test_a_seed_that_gets_the_number_makes_room(monkeypatch):
    started = []

    def spawn(*args, **more):
        if not started:
            LAST_PID.write_text(str(wanted - 1))
        started.append(programs.spawn(*args, **more))
        return started[-1]

    monkeypatch.setattr(seed, "spawn", spawn)
    collided = False
    before = children(os.getpid())
    for _ in range(50):
        started.clear()
        wanted = free_number()
        # Somebody else's process may be given the number first, but not each time.
        with (
            contextlib.suppress(PidTaken),
            seed.plant(wanted, {}, None, choose_arena([])) as nursery,
        ):
            embryo = nursery.root
            assert embryo.pid == wanted
            end(embryo)
            collided = collided or started[0] == wanted
    assert collided
    assert children(os.getpid()) <= before
