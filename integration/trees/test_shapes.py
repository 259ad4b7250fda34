"""Shapes of trees that programs make by hand: who leads what, who stands below whom, who has ended.

Each has a full checkpoint, deltas, a kill, a restore of the newest and of an older generation. Of
everybody /proc says the same afterwards; and what only shows when something happens, happens.
"""

import subprocess
import sys

import pytest

from integration.harness import Restored, dump
from integration.trees.test_trees import Tree, assert_same, places, python, views
from integration.workloads.driver import descendants, end_orphans

# A child that stays in the session that its parent had before it made one of its own.
OLDER_SESSION = """
def leaves(ready):
    global stays
    child()
    os.setsid()
    child()
    ready()
    signal.pause()
pid = child(leaves)
"""
# The same where whoever leaves is the root: what it stays in is a session of nobody here.
OLDER_THAN_ROOT = """
child()
os.setsid()
child()
"""
ORPHAN = """
libc.prctl(36, 1, 0, 0, 0)
def middle(ready):
    child()
    ready()
pid = child(middle)
os.waitpid(pid, 0)
"""
ORPHAN_BELOW = """
def adopts(ready):
    libc.prctl(36, 1, 0, 0, 0)
    def middle(told):
        child()
        told()
    os.waitpid(child(middle), 0)
    ready()
    signal.pause()
child(adopts)
"""
LEADERLESS = """
def leads(ready):
    os.setpgid(0, 0)
    ready()
    signal.pause()
leader = child(leads)
def follows(ready):
    os.setpgid(0, leader)
    ready()
    signal.pause()
child(follows)
child(follows)
os.kill(leader, 9)
os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
"""
DEEP = """
def deeper(levels):
    def run(ready):
        if levels:
            if levels % 5 == 0:
                os.setsid()
            elif levels % 3 == 0:
                os.setpgid(0, 0)
            child(deeper(levels - 1))
        ready()
        signal.pause()
    return run
child(deeper(20))
"""
OUTSIDE = "a child older than the session of the root"
SHAPES = {
    "a child older than the session of its parent": OLDER_SESSION,
    OUTSIDE: OLDER_THAN_ROOT,
    "an orphan adopted by the root": ORPHAN,
    "an orphan adopted in the tree": ORPHAN_BELOW,
    "a group whose leader has ended": LEADERLESS,
    "a group whose leader is gone": LEADERLESS + "os.waitpid(leader, 0)",
    "a stopped one": "pid = child()\nos.kill(pid, 19)\nos.waitid(os.P_PID, pid, os.WSTOPPED)",
    "twenty levels": DEEP,
}


def kill_and_reap(work, image):
    """Take the last checkpoint of a tree, which ends it."""
    work.family |= descendants(work.pid)
    dump(work.pid, image, "--kill")
    work.process.wait()
    end_orphans(work.family)


@pytest.mark.parametrize("shape", SHAPES)
def test_everybody_is_where_they_were(shape, tmp_path):
    image = tmp_path / "image"
    with Tree(python(SHAPES[shape]), start_new_session=shape != OUTSIDE) as work:
        kinds = [dump(work.pid, image)["kind"] for _ in range(3)]
        assert kinds == ["full", "delta", "delta"]
        stood = places(work.pid)
        seen = views(stood)
        assert len(stood) > 1
        kill_and_reap(work, image)
    for generation in ("3", "1"):
        with Restored(image, "--at", generation) as back:
            assert_same(back.pid, stood, seen)
            assert dump(back.pid, image)["kind"] == "delta"
            assert_same(back.pid, stood, seen)
            assert back.ask("1 + 1") == "2"


def passes(code, ask, answer, tmp_path):
    """Hold that a tree that was killed answers so when it is back, at either generation."""
    image = tmp_path / "image"
    with Tree(python(code), start_new_session=True) as work:
        dump(work.pid, image)
        kill_and_reap(work, image)
    for generation in ("1", "0"):
        with Restored(image, "--at", generation) as back:
            assert back.ask(ask) == answer


STOPPED = """
go, done = os.pipe(), os.pipe()
def answers(ready):
    ready()
    while True:
        os.write(done[1], os.read(go[0], 1))
pid = child(answers)
os.kill(pid, signal.SIGSTOP)
os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
os.set_blocking(done[0], False)
def goes_on():
    os.write(go[1], b"x")
    try:
        early = os.read(done[0], 1)
    except BlockingIOError:
        early = None
    os.kill(pid, signal.SIGCONT)
    continued = os.WIFCONTINUED(os.waitpid(pid, os.WCONTINUED)[1])
    os.set_blocking(done[0], True)
    return early, continued, os.read(done[0], 1)
"""


def test_who_was_stopped_by_hand_waits_for_sigcont(tmp_path):
    passes(STOPPED, "goes_on()", "(None, True, b'x')", tmp_path)


HARDLY_RUNS = """
os.sched_setaffinity(pid, {0})
os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
os.sched_setaffinity(0, os.sched_getaffinity(0) - {0})
"""
BUSY = "import os\nos.sched_setaffinity(0, {0})\nprint(flush=True)\nwhile True: pass"


def test_one_who_was_stopped_and_hardly_runs_has_stopped_before_others_go_on(tmp_path):
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout.readline()
            passes(STOPPED + HARDLY_RUNS, "goes_on()", "(None, True, b'x')", tmp_path)
        finally:
            busy.kill()


DEATH = """
libc.prctl(36, 1, 0, 0, 0)
told = os.pipe()
def parent(ready):
    def survives(ready):
        libc.prctl(1, signal.SIGUSR1, 0, 0, 0)
        signal.signal(signal.SIGUSR1, lambda *_: os.write(told[1], b"dead"))
        ready()
        while True:
            signal.pause()
    child(survives)
    ready()
    signal.pause()
pid = child(parent)
"""


def test_a_child_is_told_that_its_parent_has_died(tmp_path):
    passes(DEATH, "os.kill(pid, 9) or os.read(told[0], 10)", "b'dead'", tmp_path)


ADOPTING = """
told = os.pipe()
def adopts(ready):
    libc.prctl(36, 1, 0, 0, 0)
    def heard(*_):
        os.waitpid(parent, 0)
        # Whose children are there now that the one is gone.
        os.write(told[1], b"mine" if os.waitpid(-1, os.WNOHANG) == (0, 0) else b"gone")
    signal.signal(signal.SIGCHLD, heard)
    def bears(ready):
        child()
        ready()
        signal.pause()
    parent = child(bears)
    os.write(told[1], b"%d" % parent)
    ready()
    while True:
        signal.pause()
child(adopts)
parent = int(os.read(told[0], 10))
"""


def test_a_subreaper_adopts_after_the_restore(tmp_path):
    passes(ADOPTING, "os.kill(parent, 9) or os.read(told[0], 10)", "b'mine'", tmp_path)
