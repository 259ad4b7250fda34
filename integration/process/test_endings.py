"""The promise: a target that is killed under our hands is its parent's to wait for, at once."""

import os
import signal

import pytest

from ckpt.engine.dump import DumpOptions, dump
from ckpt.engine.restore import restore, wait_for_end
from ckpt.errors import TargetGone, TargetRefused
from ckpt.kernel import ptrace
from ckpt.process.freezer import freeze
from ckpt.units import Pid
from integration.errors.refusals import children
from integration.freezer.targets import await_state
from integration.workloads.driver import Program


def test_it_is_killed_while_frozen(tmp_path):
    """We are its parent too: our seeing it off must not take its status away from whoever asks."""
    with Program("s_threads", cwd=tmp_path) as program:
        with freeze(Pid(program.pid), ptrace.Option.NONE) as frozen:
            assert len(frozen.tasks) > 1
            os.kill(program.pid, signal.SIGKILL)
        assert program.process.wait(20) == -signal.SIGKILL


def test_it_is_killed_by_the_dump(tmp_path):
    with Program("s_threads", cwd=tmp_path) as program:
        dump(program.pid, tmp_path / "image", DumpOptions(kill=True))
        assert program.process.wait(20) == -signal.SIGKILL


def stop_again_and_again(pid):
    for _ in range(1000):
        with freeze(pid, ptrace.Option.NONE, timeout_s=5):
            pass


@pytest.mark.parametrize("n_yields", [0, 30, 100, 300])
def test_it_is_killed_while_it_is_being_stopped(n_yields, tmp_path):
    """None of its threads is taken for one that does not stop."""
    with Program("s_threads", cwd=tmp_path) as program:
        killer = os.fork()
        if killer == 0:
            for _ in range(n_yields):
                os.sched_yield()
            os.kill(program.pid, signal.SIGKILL)
            os._exit(0)
        # Refused before it is stopped, if it is a zombie by then.
        with pytest.raises((TargetGone, TargetRefused), match=f"process {program.pid} .*ended"):
            stop_again_and_again(Pid(program.pid))
        os.waitpid(killer, 0)
        await_state(program.pid, "Z")
        assert program.process.wait(20) == -signal.SIGKILL


def test_it_is_killed_while_somebody_else_is_its_parent(tmp_path):
    """Then the parent hears of it only when we have seen it off."""
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        program = Program("s_threads", cwd=tmp_path)
        os.write(writer, str(program.pid).encode())
        ended = program.process.wait(20)
        os._exit(0 if ended == -signal.SIGKILL else 1)
    try:
        pid = Pid(int(os.read(reader, 20)))
        with freeze(pid, ptrace.Option.NONE):
            os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 0
    finally:
        os.close(reader)
        os.close(writer)


def test_a_restored_process_ends_before_all_its_threads_were_let_go(tmp_path, monkeypatch):
    """The first thread that runs may end it: no failure of the restore, and nobody hangs."""
    with Program("s_threads", cwd=tmp_path) as program:
        dump(program.pid, tmp_path / "image", DumpOptions(kill=True))
    let_go = []

    def detach(tid):
        ptrace_detach(tid)
        let_go.append(tid)
        os.kill(program.pid, signal.SIGKILL)

    ptrace_detach = ptrace.detach
    monkeypatch.setattr(ptrace, "detach", detach)
    before = children(os.getpid())
    assert restore(tmp_path / "image").pid == program.pid
    assert len(let_go) == 1
    assert wait_for_end(Pid(program.pid)) == 128 + signal.SIGKILL
    # Its keeper ends with it, and is our child too.
    for pid in children(os.getpid()) - before:
        os.waitpid(pid, 0)
