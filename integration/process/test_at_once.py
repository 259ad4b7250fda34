"""The promise: many processes are asked at the same time, and what one suffers harms no other."""

import contextlib
import os
import signal

import pytest

from ckpt.errors import CkptError, TargetGone
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.userfaultfd import UffdFeature
from ckpt.process.arena import arenas
from ckpt.process.freezer import freeze
from ckpt.process.remote import Out, call
from ckpt.process.together import Asked, run_on_all, try_on_all
from ckpt.process.urgent import urgently
from ckpt.process.userfault import make_inside_each
from ckpt.units import Pid
from integration.errors.refusals import untouched
from integration.freezer.targets import child
from integration.workloads.driver import Program

N_PROCESSES = 12
QUESTIONS = [call(NR.getpid), call(NR.getcwd, Out(4096), 4096), call(NR.gettid)]
_NOBODY = 65534


def be_ready():
    pass


@pytest.fixture
def pids():
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(child(be_ready)) for _ in range(N_PROCESSES)]


@contextlib.contextmanager
def all_stopped(pids):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(freeze(Pid(pid), ptrace.Option.NONE)) for pid in pids]


def wanted(stopped):
    return [(one.pid, one.tgid, one.leader) for one in stopped]


def ask(stopped, lent, calls):
    return [Asked(arena, one.leader, calls) for one, arena in zip(stopped, lent, strict=True)]


def kill(pid):
    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def all_untouched(pids):
    with contextlib.ExitStack() as stack:
        for pid in pids:
            stack.enter_context(untouched(pid))
        yield


def test_each_of_many_processes_answers_for_itself(pids):
    here = os.fsencode(os.getcwd()) + b"\0"
    with all_untouched(pids), all_stopped(pids) as stopped, arenas(wanted(stopped)) as lent:
        for _ in range(2):
            answers = run_on_all(ask(stopped, lent, QUESTIONS))
            assert [replies[0].value for replies in answers] == pids
            assert all(replies[1].outs[0].startswith(here) for replies in answers)


def test_programs_do_not_notice(tmp_path):
    """Registers, masks, threads: what they check of themselves."""
    names = ["s_registers", "s_signals", "s_threads"] * 2
    with contextlib.ExitStack() as stack:
        programs = [stack.enter_context(Program(name, cwd=tmp_path)) for name in names]
        for _ in range(5):
            with (
                all_stopped([one.pid for one in programs]) as stopped,
                arenas(wanted(stopped)) as lent,
            ):
                asked = [
                    Asked(arena, task, QUESTIONS)
                    for one, arena in zip(stopped, lent, strict=True)
                    for task in one.tasks.values()
                ]
                tids = [task.tid for one in stopped for task in one.tasks.values()]
                assert [replies[2].value for replies in run_on_all(asked)] == tids
            assert [one.ask("check") for one in programs] == ["ok"] * len(programs)


@pytest.mark.parametrize("victim", [0, 5, N_PROCESSES - 1])
def test_one_that_is_killed_is_a_result(pids, victim):
    others = [pid for pid in pids if pid != pids[victim]]
    with all_untouched(others), all_stopped(pids) as stopped, arenas(wanted(stopped)) as lent:
        kill(pids[victim])
        answers = try_on_all(ask(stopped, lent, QUESTIONS))
        assert isinstance(answers.pop(victim), CkptError)
        assert [replies[0].value for replies in answers] == others


def test_one_that_is_killed_before_leaves_no_arena_in_the_others(pids):
    with all_untouched(pids[1:]), all_stopped(pids) as stopped:
        assert stopped[0].leader.maps_lines
        kill(pids[0])
        with pytest.raises(TargetGone), arenas(wanted(stopped)):
            pytest.fail("all of them have one")


def test_one_that_is_killed_leaves_no_descriptor_in_the_others(pids):
    """Each makes a userfaultfd; those that live must close it again."""
    with all_untouched(pids[1:]), all_stopped(pids) as stopped, arenas(wanted(stopped)) as lent:
        kill(pids[0])
        makers = [(one.pid, arena, one.leader) for one, arena in zip(stopped, lent, strict=True)]
        with pytest.raises(TargetGone):
            make_inside_each(makers, UffdFeature(0), user_faults_only=True, remedy="")


# -- going before others ---------------------------------------------------------------------------


def niceness():
    return os.getpriority(os.PRIO_PROCESS, 0)


def test_urgent_is_only_the_block():
    def fail_urgently():
        with urgently():
            assert niceness() == -20
            raise ZeroDivisionError

    before = niceness()
    with pytest.raises(ZeroDivisionError):
        fail_urgently()
    assert niceness() == before


def test_who_may_not_be_urgent_is_not():
    def check_as_nobody():
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        before = niceness()
        with urgently():
            assert niceness() == before
        assert niceness() == before

    with child(check_as_nobody) as pid:
        assert os.getpriority(os.PRIO_PROCESS, pid) == niceness()
