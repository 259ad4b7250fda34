"""A process that was frozen is what it was, once thawed: stopped, signalled, busy, another's."""

import ctypes
import os
import signal
import threading
from pathlib import Path

import pytest

from ckpt.errors import TargetGone, TargetRefused
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.procfs.files import list_tids
from ckpt.kernel.procfs.maps import read_maps
from ckpt.process.arena import find_syscall_insn
from ckpt.process.freezer import freeze
from ckpt.process.tree import reachable_as
from ckpt.units import Pid
from integration.freezer.targets import await_state, child, disturb, state_of, status_lines
from integration.workloads.driver import Program

_PR_SET_MDWE, _PR_GET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN = 65, 66, 1
_NOBODY = 65534
MASKS = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")


def nothing():
    pass


def handle(*_):
    pass


def stop_and_wait(pid):
    os.kill(pid, signal.SIGSTOP)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


def test_a_stopped_process_stays_stopped_and_can_be_continued():
    with child(nothing) as pid:
        stop_and_wait(pid)
        for _ in range(5):
            frozen = disturb(pid)
            assert frozen.leader.group_stopped == signal.SIGSTOP
            await_state(pid, "T")
        os.kill(pid, signal.SIGCONT)
        _, status = os.waitpid(pid, os.WCONTINUED)
        assert os.WIFCONTINUED(status)
        disturb(pid)
        assert state_of(pid) != "T"


def test_every_thread_of_a_stopped_process_stays_stopped(tmp_path):
    with Program("s_threads", cwd=tmp_path) as program:
        stop_and_wait(program.pid)
        disturb(program.pid)
        for tid in list_tids(Pid(program.pid)):
            await_state(tid, "T")
        os.kill(program.pid, signal.SIGCONT)
        assert program.ask("check") == "ok"


def test_a_stop_that_comes_while_frozen_takes_effect_afterwards():
    with child(nothing) as pid:
        with freeze(Pid(pid), ptrace.Option.NONE):
            os.kill(pid, signal.SIGSTOP)
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGSTOP


def test_a_stop_that_our_own_calls_run_into_takes_effect_afterwards():
    with child(nothing) as pid:
        with freeze(Pid(pid), ptrace.Option.NONE) as frozen:
            os.kill(pid, signal.SIGSTOP)
            frozen.leader.run_single(find_syscall_insn(Pid(pid), read_maps(Pid(pid))), NR.getpid)
            assert frozen.leader.deferred_stop
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)


def test_pending_signals_stay_pending():
    def block():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGRTMIN + 3})
        os.kill(os.getpid(), signal.SIGUSR1)
        signal.pthread_kill(threading.get_ident(), signal.SIGRTMIN + 3)

    with child(block) as pid:
        before = status_lines(pid, *MASKS)
        for _ in range(5):
            disturb(pid)
        assert status_lines(pid, *MASKS) == before


def test_a_signal_that_comes_while_frozen_is_delivered_afterwards():
    with child(nothing) as pid:
        with freeze(Pid(pid), ptrace.Option.NONE):
            os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_DFL, handle])
@pytest.mark.parametrize("sig", [signal.SIGTRAP, signal.SIGSEGV, signal.SIGWINCH])
def test_what_is_done_about_a_signal_stays_the_same(sig, action):
    with child(lambda: signal.signal(sig, action)) as pid:
        before = status_lines(pid, *MASKS)
        disturb(pid)
        assert status_lines(pid, *MASKS) == before


def test_a_process_that_handles_every_signal_is_not_told_of_our_work(tmp_path):
    with Program("s_signals", "all", cwd=tmp_path) as program:
        for _ in range(3):
            disturb(program.pid)
        assert program.ask("check") == "ok"


@pytest.mark.skipif(
    ctypes.CDLL(None).prctl(_PR_GET_MDWE, 0, 0, 0, 0) < 0, reason="this kernel has no PR_SET_MDWE"
)
def test_memory_that_may_not_be_made_executable_is_no_hindrance():
    def forbid():
        assert ctypes.CDLL(None).prctl(_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0

    with child(forbid) as pid:
        before = Path(f"/proc/{pid}/maps").read_text()
        disturb(pid)
        assert Path(f"/proc/{pid}/maps").read_text() == before


def test_the_mappings_are_the_same_afterwards(tmp_path):
    with Program("s_threads", cwd=tmp_path) as program:
        before = Path(f"/proc/{program.pid}/maps").read_text()
        disturb(program.pid)
        assert Path(f"/proc/{program.pid}/maps").read_text() == before


def test_new_threads_do_not_escape():
    def make_threads():
        for _ in range(20):
            threading.Thread(target=nothing).start()

    with child(nothing, make_threads) as pid:
        for _ in range(50):
            with freeze(Pid(pid), ptrace.Option.NONE) as frozen:
                assert set(list_tids(Pid(pid))) == set(frozen.tasks)
                assert {state_of(tid) for tid in frozen.tasks} <= {"t", "T"}
        disturb(pid)


def test_a_process_of_another_user_is_frozen_too():
    def become_nobody():
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)

    with child(become_nobody) as pid:
        before = status_lines(pid, "Uid", "Gid", "CapEff", *MASKS)
        disturb(pid)
        assert status_lines(pid, "Uid", "Gid", "CapEff", *MASKS) == before


def test_a_process_that_is_killed_while_frozen_is_gone_without_a_complaint():
    with child(nothing) as pid:
        with freeze(Pid(pid), ptrace.Option.NONE):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises((TargetGone, TargetRefused)):
            disturb(pid)


@pytest.mark.parametrize(
    ("pid", "reason"),
    [(os.getpid(), "ckpt itself"), (os.getppid(), "ancestor"), (1, "ancestor"), (2, "kernel")],
)
def test_what_must_not_be_stopped_is_refused(pid, reason):
    with pytest.raises(TargetRefused, match=reason), freeze(Pid(pid), ptrace.Option.NONE):
        pass


def test_one_that_is_already_traced_is_refused():
    with (
        child(nothing) as pid,
        freeze(Pid(pid), ptrace.Option.NONE),
        pytest.raises(TargetRefused, match="traced"),
    ):
        disturb(pid)


def test_a_process_whose_first_thread_has_ended_is_frozen_by_another_one():
    def leave_the_others_alone():
        threading.Thread(target=signal.pause).start()
        ctypes.CDLL(None).syscall(60, 0)  # exit, of this thread only

    with child(nothing, leave_the_others_alone) as pid:
        await_state(pid, "Z")
        with freeze(reachable_as(Pid(pid)), ptrace.Option.NONE) as frozen:
            assert frozen.number == pid != frozen.pid
            assert [*frozen.tasks] == [frozen.pid]
        with pytest.raises(TargetRefused), freeze(Pid(pid), ptrace.Option.NONE):
            pass
