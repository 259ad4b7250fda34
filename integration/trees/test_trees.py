"""Trees of processes as users make them: dumped, killed, restored, everybody where they were."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt.kernel.procfs.files import list_tids
from ckpt.kernel.procfs.stat import read_stat
from ckpt.units import Pid
from integration.errors.refusals import nobody_left, refused
from integration.freezer.targets import await_state
from integration.harness import Restored, become_subreaper, dump
from integration.procview import lasting_differences, view
from integration.workloads.driver import Dialogue, descendants, end_orphans

become_subreaper()

PRELUDE = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)

def child(run=signal.pause):
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        try:
            if run is signal.pause:
                os.write(tell, b"x")
                run()
            run(lambda: os.write(tell, b"x"))
        finally:
            os._exit(0)
    os.close(tell)
    os.read(told, 1)
    os.close(told)
    return pid

def say(*words):
    print(*words, flush=True)

def commands():
    say("ready")
    for line in sys.stdin:
        say(eval(line))
"""


class Tree(Dialogue):
    """A program with descendants, in a session of its own; all are killed at the end."""

    def __init__(self, command, **more):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            **more,
        )
        self.pid = self.process.pid
        super().__init__(self.process.stdin.fileno(), self.process.stdout.fileno())
        self.family = set()

    def __enter__(self):
        assert self.line() == "ready"
        return self

    def __exit__(self, *_):
        self.family |= descendants(self.pid)
        self.process.kill()
        self.process.wait()
        # They have our pipes open.
        end_orphans(self.family)
        self.process.communicate()


def python(code):
    return [sys.executable, "-S", "-c", f"{PRELUDE}\n{code}\ncommands()"]


def shell(code):
    return ["bash", "-c", f'{code}\necho ready\nwhile read -r line; do eval "$line"; done']


def places(root):
    """Return who stands where, of a tree; the parent of the root is nobody of it."""
    found = {}
    for pid in sorted({root} | descendants(root)):
        stat = read_stat(Pid(pid))
        parent = 0 if pid == root else stat.ppid
        asleep = "S" if stat.state in "SRD" else stat.state
        found[pid] = (parent, stat.session, stat.pgrp, stat.comm, asleep)
    return found


def views(stood):
    return {pid: view(pid) for pid, place in stood.items() if place[4] != "Z"}


def assert_same(root, stood, seen):
    """Hold that everybody is back."""
    for pid, place in stood.items():
        if place[4] == "T":
            # A stop that waits when it is let go is taken when it gets a processor.
            await_state(pid, "T")
    assert places(root) == stood
    for pid, before in seen.items():
        assert lasting_differences(before, pid) == []


TREES = {
    "shell": shell("sleep 1000 | cat >/dev/null &"),
    "jobs": shell("set -m; sleep 1000 | cat >/dev/null & sleep 1001 & sleep 1002 & kill -STOP %3"),
}


@pytest.mark.parametrize("name", TREES)
def test_everybody_comes_back(name, tmp_path):
    image = tmp_path / "image"
    with Tree(TREES[name], start_new_session=True) as work:
        kinds = [dump(work.pid, image)["kind"] for _ in range(3)]
        assert kinds == ["full", "delta", "delta"]
        stood = places(work.pid)
        seen = views(stood)
        assert len(stood) > 1
        work.family |= set(stood) - {work.pid}
        dump(work.pid, image, "--kill")
        work.process.wait()
        end_orphans(work.family)
    with Restored(image) as back:
        assert back.pid == work.pid
        assert_same(back.pid, stood, seen)
        assert dump(back.pid, image)["kind"] == "delta"
    with Restored(image, "--at", "1") as back:
        assert_same(back.pid, stood, seen)


ENDED = python(
    """
got = []
signal.signal(signal.SIGCHLD, lambda *_: got.append(1))
exits = child(lambda ready: ready())
dies = child()
os.kill(dies, 15)
os.waitid(os.P_PID, exits, os.WEXITED | os.WNOWAIT)
os.waitid(os.P_PID, dies, os.WEXITED | os.WNOWAIT)
got.clear()
""".replace("lambda ready: ready()", "lambda ready: os._exit(7)")
)


def test_a_restored_parent_waits_for_those_that_had_ended(tmp_path):
    image = tmp_path / "image"
    with Tree(ENDED) as work:
        dump(work.pid, image)
        stood = places(work.pid)
        assert [place[4] for place in stood.values()] == ["S", "Z", "Z"]
    with Restored(image) as back:
        assert places(back.pid).keys() == stood.keys()
        assert back.ask("len(got)") == "0"
        assert back.ask("os.waitpid(exits, 0)[1] >> 8") == "7"
        assert back.ask("os.waitpid(dies, 0)[1]") == "15"
        assert back.ask("len(got)") == "0"


SHARED = python("""
file = os.open("/proc/self/exe", os.O_RDONLY)
near, far = os.pipe()
def reads(ready):
    ready()
    while True:
        os.read(go[0], 1)
        os.read(file, 100)
        os.write(done[1], b"x")
def writes(ready):
    os.write(far, b"queued")
    ready()
    signal.pause()
go, done = os.pipe(), os.pipe()
os.lseek(file, 1000, 0)
child(reads)
child(writes)
def step():
    os.write(go[1], b"x")
    os.read(done[0], 1)
    return os.lseek(file, 0, 1)
""")


def test_siblings_share_an_offset_and_what_is_in_a_pipe(tmp_path):
    image = tmp_path / "image"
    with Tree(SHARED) as work:
        assert work.ask("step()") == "1100"
        dump(work.pid, image)
    with Restored(image) as back:
        assert back.ask("step()") == "1200"
        assert back.ask("os.read(near, 100)") == "b'queued'"


def test_a_generation_holds_those_that_were_there(tmp_path):
    image = tmp_path / "image"
    trees = []
    with Tree(python("made = [child()]")) as work:
        dump(work.pid, image)
        trees.append(set(places(work.pid)))
        assert work.ask("made.append(child())") == "None"
        assert dump(work.pid, image)["kind"] == "delta"
        trees.append(set(places(work.pid)))
        assert work.ask("(os.kill(made[0], 9), os.waitpid(made[0], 0))[1][1]") == "9"
        assert dump(work.pid, image)["kind"] == "delta"
        trees.append(set(places(work.pid)))
    assert [len(tree) for tree in trees] == [2, 3, 2]
    for number, tree in enumerate(trees):
        with Restored(image, "--at", str(number)) as back:
            assert set(places(back.pid)) == tree


VFORKED = """
import threading
STACK = ctypes.create_string_buffer(1 << 16)
pause = ctypes.cast(libc.pause, ctypes.c_void_p)
libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
top = (ctypes.addressof(STACK) + (1 << 16)) & ~15
CLONE_VM, CLONE_VFORK = 0x100, 0x4000
flags = CLONE_VM | CLONE_VFORK | signal.SIGCHLD
threading.Thread(target=lambda: libc.clone(pause, top, flags, None), daemon=True).start()
"""


def test_a_vfork_that_waits_is_named(tmp_path):
    with Tree(python(VFORKED)) as work:
        (tid,) = set(list_tids(Pid(work.pid))) - {work.pid}
        await_state(tid, "D")
        (pid,) = descendants(work.pid)
        said = refused(21, "dump", "--pid", work.pid, tmp_path / "image")
        assert f"process {pid}: was made by vfork" in said
        assert descendants(work.pid) == {pid}
        assert work.ask("1 + 1") == "2"


ADOPTED = """
libc.prctl(36, 1, 0, 0, 0)

def clone():
    return libc.syscall(56, 0x400 | 17, 0, 0, 0, 0)

def grow(ready):
    if clone() == 0:
        if clone() == 0:
            signal.pause()
        os._exit(0)
    os.wait()
    ready()
    signal.pause()

child(lambda ready: (child(grow), ready(), signal.pause()))
"""


def test_a_child_that_shares_with_somebody_far_away_is_named(tmp_path):
    with Tree(python(ADOPTED)) as work:
        stood = places(work.pid)
        assert len(stood) == 4
        said = refused(21, "dump", "--pid", work.pid, tmp_path / "image")
        assert "shares its files with process" in said
        assert places(work.pid) == stood


UNSHARED = """
import threading
ready = threading.Event()
def live_apart():
    libc.unshare(FLAG)
    ready.set()
    signal.pause()
threading.Thread(target=live_apart, daemon=True).start()
ready.wait()
"""


@pytest.mark.parametrize(("flag", "what"), [(0x400, "descriptors"), (0x200, "working directory")])
def test_a_thread_that_shares_no_more_is_named(flag, what, tmp_path):
    with Tree(python(UNSHARED.replace("FLAG", str(flag)))) as work:
        (tid,) = set(list_tids(Pid(work.pid))) - {work.pid}
        stood = places(work.pid)
        said = refused(21, "dump", "--pid", work.pid, tmp_path / "image")
        assert said.count(f"thread {tid}: has") == 1
        assert what in said
        assert places(work.pid) == stood


def test_a_child_that_is_debugged_is_named(tmp_path):
    debugger = """
def traced(ready):
    libc.ptrace(0, 0, 0, 0)
    ready()
    signal.pause()
pid = child(traced)
"""
    with Tree(python(debugger)) as work:
        stood = places(work.pid)
        (pid,) = set(stood) - {work.pid}
        said = refused(23, "dump", "--pid", work.pid, tmp_path / "image")
        assert f"process {pid}" in said
        assert places(work.pid) == stood


@contextlib.contextmanager
def taking(pid):
    """Run somebody who has that number, which is free."""
    while True:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        with subprocess.Popen(["sleep", "1000"]) as taker:
            try:
                # Somebody else on this machine may be given the number first, and end soon.
                if taker.pid == pid:
                    yield
                    return
            finally:
                taker.kill()


def test_a_pid_of_a_child_that_is_taken_leaves_nobody(tmp_path):
    image = tmp_path / "image"
    with Tree(python("pid = child()")) as work:
        dump(work.pid, image)
        pid = int(work.ask("pid"))
    with taking(pid), nobody_left(work.pid):
        assert str(pid) in refused(41, "restore", image)
