"""The promise: a process that must not be dumped is refused by its reason, and neither it nor the
image directory notices."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from ckpt.image.chain import Chain
from ckpt.image.verify import verify
from ckpt.kernel import ptrace
from ckpt.units import Tid
from integration.errors.refusals import refused, unchanged, untouched
from integration.harness import CKPT
from integration.workloads.driver import Program

NOBODY = 99_999_999


@pytest.fixture
def image(tmp_path):
    """Where nothing must appear."""
    return tmp_path / "image"


def refused_everywhere(code, pid, image):
    """Dump and check must say the same; return it."""
    with unchanged(image):
        message = refused(code, "dump", "--pid", pid, image)
    assert refused(code, "check", "--pid", pid) == message
    return message


def gone():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("pid", [gone, lambda: NOBODY, lambda: 2**31, lambda: 2**70])
def test_nobody(pid, image):
    number = pid()
    message = refused_everywhere(20, number, image)
    assert message == f"process {number} does not exist (or has just ended)"


@pytest.mark.parametrize(
    ("pid", "reason"),
    [
        (os.getpid, "is an ancestor of this ckpt"),
        (lambda: 1, "is an ancestor of this ckpt"),
        (lambda: 2, "is a kernel thread (kthreadd)"),
    ],
)
def test_one_that_must_not_be_stopped(pid, reason, image):
    assert reason in refused_everywhere(23, pid(), image)


def test_ckpt_itself(image):
    """A shell that becomes ckpt knows the number that it will have."""
    command = 'exec "$@" --pid $$'
    done = subprocess.run(
        ["sh", "-c", command, "sh", *CKPT, "dump", str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 23
    assert done.stderr.endswith(" is ckpt itself\n")
    assert not image.exists()


def test_a_thread_that_is_no_process(image, tmp_path):
    with Program("s_threads", cwd=tmp_path) as program:
        tids = {int(name) for name in os.listdir(f"/proc/{program.pid}/task")}
        tid = max(tids - {program.pid})
        with untouched(program.pid):
            message = refused_everywhere(23, tid, image)
        assert message == f"process {tid} is a thread of process {program.pid}: name that one"
        assert program.ask("check") == "ok"


def test_a_zombie(image):
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert "a zombie" in refused_everywhere(23, process.pid, image)
    process.wait()


def test_one_that_is_traced(work, image):
    tid = Tid(work.pid)
    ptrace.seize(tid, ptrace.Option.NONE)
    try:
        message = refused_everywhere(23, work.pid, image)
    finally:
        ptrace.interrupt(tid)
        ptrace.wait(tid)
        ptrace.detach(tid)
    assert message == (
        f"process {work.pid} is traced by process {os.getpid()}: detach that debugger first"
    )
    assert work.ask("check") == "ok"


def tracer_of(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("TracerPid:"))


@pytest.mark.parametrize("n_yields", [None, 0, 100, 1000, 3000, 10_000])
def test_one_that_ends_while_it_is_dumped(n_yields, tmp_path):
    """Before it is stopped or at some moment after: it is gone, or it was dumped whole."""
    image = tmp_path / "image"
    with Program("s_registers", cwd=tmp_path) as program:
        command = [*CKPT, "dump", "--pid", str(program.pid), str(image)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as dumping:
            if n_yields is not None:
                while not tracer_of(program.pid) and dumping.poll() is None:
                    os.sched_yield()
                for _ in range(n_yields):
                    os.sched_yield()
            os.kill(program.pid, signal.SIGKILL)
            sentence = dumping.stderr.read()
            code = dumping.wait()
    if code:
        # Not yet waited for by the test, it is a zombie.
        ended = f"process {program.pid} has ended already and waits for its parent (a zombie)"
        gone = f"process {program.pid} does not exist (or has just ended)"
        assert (code, sentence) in [(20, f"ckpt: {gone}\n"), (23, f"ckpt: {ended}\n")]
        assert not image.exists() or Chain.open(image).generations() == []
    else:
        assert verify(Chain.open(image)) == []


PROGRAM_OF_NOBODY = """
import locale, os, sys
# Before the change: the modules may lie where only we may read.
import ckpt.cli.dump, ckpt.cli.main
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(ckpt.cli.main.main())
"""


def test_a_user_who_may_not(work):
    """Without privilege a process of somebody else is not ours to stop."""
    with tempfile.TemporaryDirectory() as folder, untouched(work.pid):
        os.chmod(folder, 0o777)
        args = ["dump", "--pid", str(work.pid), f"{folder}/image"]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM_OF_NOBODY, *args],
            capture_output=True,
            text=True,
            check=False,
        )
        assert os.listdir(folder) == []
    assert done.returncode == 12, done.stderr
    assert done.stderr.startswith("ckpt: not permitted to ")
    assert done.stderr.count("\n") == 1
