"""The promise: a restore that is killed leaves a whole process behind or none, and nothing of ours.

Each kill is a SIGKILL of the process that restores: nothing of ckpt runs after it.
"""

import contextlib
import os
import random
import select
import signal
import time

import attrs
import pytest

from ckpt.engine.dump import DumpOptions, dump
from ckpt.engine.restore import restore
from ckpt.process import seed
from ckpt.process.keeper import NAME
from ckpt.resources.base import RestoreOptions
from integration.errors.refusals import children
from integration.harness import become_subreaper
from integration.process.test_killed_tracer import let_pass
from integration.workloads.driver import ANSWER_S, Dialogue, Program

N_KILLS = int(os.environ.get("CKPT_KILLS", "60"))


@pytest.fixture(scope="module", autouse=True)
def _orphans_are_ours():
    become_subreaper()


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """The image directory of a process that is gone, and its pid."""
    folder = tmp_path_factory.mktemp("dead")
    with Program("s_threads", cwd=folder) as program:
        dump(program.pid, folder / "image", DumpOptions(kill=True))
    return folder / "image", program.pid


@attrs.define
class Restorer:
    """A fork of ours that restores, and what it leaves behind when it is killed."""

    pid: int
    dialogue: Dialogue
    pipes: list[int]
    others: set[int]
    """Our children before it."""
    exit_code: int | None = None
    """How it ended, negative by a signal."""

    def left(self):
        """Return the processes that stay, each one the program and whole; reap those that end."""
        self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        stay = []
        # Told before anyone is looked at: who is still under construction will never answer.
        self.dialogue.tell("check")
        # Those below one that ends become ours then.
        while new := children(os.getpid()) - self.others - set(stay):
            # The first of a pid namespace ends only when the others in it were waited for.
            stay += [pid for pid in sorted(new, reverse=True) if self._stays(pid)]
        return sorted(stay)

    def _stays(self, pid):
        pidfd = os.pidfd_open(pid)
        try:
            ready = select.select([pidfd, self.pipes[2]], [], [], ANSWER_S)[0]
            assert ready, f"{name_of(pid)} ({pid}) neither ends nor answers"
            if pidfd in ready:
                os.waitpid(pid, 0)
            return pidfd not in ready
        finally:
            os.close(pidfd)


def name_of(pid):
    with open(f"/proc/{pid}/comm") as comm:
        return comm.read().strip()


@contextlib.contextmanager
def restorer(work):
    """Fork a process that does `work` with new pipes as its standard streams."""
    others = children(os.getpid())
    for_it, commands = os.pipe()
    answers, by_it = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(for_it, 0)
            os.dup2(by_it, 1)
            for fd in (for_it, commands, answers, by_it):
                os.close(fd)
            work()
            signal.pause()
        finally:
            os._exit(1)
    one = Restorer(pid, Dialogue(commands, answers), [for_it, commands, answers, by_it], others)
    try:
        yield one
    finally:
        for fd in one.pipes:
            os.close(fd)


def end_all(pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_killed_at_any_moment(dead, promise):
    kept = promise("a restore that is killed leaves nothing, or all of it")
    chance = random.Random("restore")
    image, pid = dead
    n_whole = 0
    with restorer(lambda: restore(image)) as one:
        begun_s = time.monotonic()
        one.dialogue.tell("check")
        assert one.dialogue.line() == "ok"
        # As long as it takes on this machine, under this load, and as much again.
        longest_s = 2 * (time.monotonic() - begun_s)
        os.kill(one.pid, signal.SIGKILL)
        end_all(one.left())
    for number in range(N_KILLS):
        kept.try_once()
        with restorer(lambda: restore(image)) as one:
            let_pass(chance.uniform(0, longest_s))
            os.kill(one.pid, signal.SIGKILL)
            stay = one.left()
            if stay:
                names = [name_of(pid) for pid in stay]
                # Its keeper ends with it.
                assert (stay[0], names[1:] or [NAME]) == (pid, [NAME]), f"kill {number}: {names}"
                assert one.dialogue.line() == "ok"
                n_whole += 1
                end_all(stay)
            assert children(os.getpid()) <= one.others
    # Neither always too early nor always too late: the moments are those of a restore.
    assert 0 < n_whole < N_KILLS


MOMENTS = {
    "the seed is no tracee yet": "take_over",
    "the seed is taken over": "clone",
    "the process is made": "end_process",
    "it has its arena": "Arena",
}


@pytest.mark.parametrize("new_pids", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_when(moment, new_pids, dead, monkeypatch):
    def kill_me(*_args, **_more):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(seed, MOMENTS[moment], kill_me)
    options = RestoreOptions(new_pids=new_pids)
    with restorer(lambda: restore(dead[0], None, options)) as one:
        assert one.left() == []
        assert children(os.getpid()) <= one.others
