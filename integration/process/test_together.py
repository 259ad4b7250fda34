"""The promise: many threads run their batches at once, and each answers for itself."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from ckpt.errors import TargetGone
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import Prctl
from ckpt.kernel.procfs.files import read_bytes
from ckpt.kernel.procfs.status import parse_signal_masks
from ckpt.process.arena import arena
from ckpt.process.freezer import freeze
from ckpt.process.remote import In, Out, call
from ckpt.process.together import run_on_each
from ckpt.units import Pid

N_THREADS = 40
PROGRAM = """
import ctypes, signal, sys, threading
if "all" in sys.argv:
    for sig in (signal.SIGWINCH, signal.SIGURG, signal.SIGCHLD):
        signal.signal(sig, lambda *_: None)
if "block" in sys.argv:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
libc = ctypes.CDLL(None)
go_on = threading.Event()
def wait(number):
    libc.prctl(15, b"thread %d" % number, 0, 0, 0)
    started.release()
    go_on.wait()
started = threading.Semaphore(0)
threads = [threading.Thread(target=wait, args=(n,)) for n in range(int(sys.argv[1]))]
for thread in threads:
    thread.start()
    started.acquire()
print("ready", flush=True)
sys.stdin.readline()
go_on.set()
for thread in threads:
    thread.join()
print("ended well", flush=True)
"""
QUESTIONS = [call(NR.gettid), call(NR.prctl, Prctl.GET_NAME, Out(16)), call(NR.getppid)]


@contextmanager
def threads(*options):
    command = [sys.executable, "-c", PROGRAM, str(N_THREADS), *options]
    child = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


@contextmanager
def stopped(child):
    pid = Pid(child.pid)
    with (
        freeze(pid, ptrace.Option.NONE) as frozen,
        arena(pid, frozen.tgid, frozen.leader) as lent,
    ):
        yield frozen, lent


def check(replies, tids):
    assert [own[0].value for own in replies] == tids
    assert {own[2].value for own in replies} == {os.getpid()}
    names = {own[1].outs[0].partition(b"\0")[0] for own in replies}
    assert {b"thread %d" % number for number in range(N_THREADS)} <= names


@pytest.mark.parametrize("options", [(), ("all",)], ids=["", "that use every signal"])
def test_each_of_many_threads(options):
    with threads(*options) as child:
        with stopped(child) as (frozen, lent):
            assert len(frozen.tasks) == N_THREADS + 1
            for _ in range(2):
                tasks = list(frozen.tasks.values())
                check(run_on_each(lent, [(task, QUESTIONS) for task in tasks]), list(frozen.tasks))
        assert child.communicate("go on\n")[0] == "ended well\n"


def test_different_questions_and_one_that_needs_the_whole_arena():
    with threads() as child:
        with stopped(child) as (frozen, lent):
            tasks = list(frozen.tasks.values())
            asked = [
                (task, [call(NR.gettid)] * (index % 5 + 1)) for index, task in enumerate(tasks)
            ]
            big = call(NR.write, -1, In(b"x" * 9000), 9000)
            asked[7] = tasks[7], [call(NR.gettid), big, call(NR.gettid)]
            for (task, calls), replies in zip(asked, run_on_each(lent, asked), strict=True):
                assert len(replies) == len(calls)
                assert {reply.value for reply in replies if reply.ok} == {task.tid}
                assert replies[-1].value == task.tid
        assert child.communicate("go on\n")[0] == "ended well\n"


def test_the_very_signal_that_marks_the_end_comes_from_somebody_else():
    with threads() as child:
        with stopped(child) as (frozen, lent):
            tasks = list(frozen.tasks.values())
            for task in tasks:
                assert task.status_text
            os.kill(child.pid, signal.SIGWINCH)
            for task in tasks[::3]:
                tgkill(child.pid, task.tid, signal.SIGWINCH)
            check(run_on_each(lent, [(task, QUESTIONS) for task in tasks]), list(frozen.tasks))
        assert child.communicate("go on\n")[0] == "ended well\n"


def test_the_signal_is_one_that_they_block_and_wait_for():
    with threads("block") as child:
        with stopped(child) as (frozen, lent):
            tasks = list(frozen.tasks.values())
            for task in tasks:
                assert task.status_text
            os.kill(child.pid, signal.SIGWINCH)
            check(run_on_each(lent, [(task, QUESTIONS) for task in tasks]), list(frozen.tasks))
            pending = parse_signal_masks(read_bytes(frozen.leader.tid, "status")).shared_pending
            assert pending >> (signal.SIGWINCH - 1) & 1
        assert child.communicate("go on\n")[0] == "ended well\n"


def tgkill(pid, tid, sig):
    from ckpt.kernel.libc import syscall

    syscall(NR.tgkill, pid, tid, sig)


def test_a_target_that_is_killed_meanwhile():
    with threads() as child:
        with pytest.raises(TargetGone):
            _ask_when_killed(child)
        assert child.wait() == -signal.SIGKILL


def _ask_when_killed(child):
    with stopped(child) as (frozen, lent):
        asked = [(task, QUESTIONS) for task in frozen.tasks.values()]
        os.kill(child.pid, signal.SIGKILL)
        run_on_each(lent, asked)
