"""The promise: restores of many threads go on together, each in its own order, to its own end."""

import signal

import pytest

from ckpt.engine.rebuilding import Rebuilding, in_order, run_in_rounds
from ckpt.errors import RestoreFailed
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import Prctl
from ckpt.process.remote import In, Out, call
from ckpt.process.seed import Embryo
from integration.process.test_together import stopped, threads

GET_NAME = call(NR.prctl, Prctl.GET_NAME, Out(16))


def name(text):
    return call(NR.prctl, Prctl.SET_NAME, In(text.ljust(16, b"\0")))


def counting(task, n_rounds, said):
    """Ask so often, some of it for nothing; note what came."""
    for number in range(n_rounds):
        calls = [] if number % 3 == 2 else [call(NR.gettid), name(b"%d" % number), GET_NAME]
        replies = yield calls
        said.append((task.tid, number, len(replies) == len(calls)))
        if calls:
            assert replies[0].value == task.tid
            assert replies[2].outs[0].rstrip(b"\0") == b"%d" % number


def failing():
    yield [call(NR.getpid)]
    raise RestoreFailed("a step", "no")


@pytest.fixture
def embryo():
    """Lend a process with many threads as if it were one under construction."""
    with threads() as child:
        with stopped(child) as (frozen, lent):
            yield Embryo(frozen.pid, frozen.pid, frozen.leader, frozen.tasks, lent)
        assert child.communicate("go on\n")[0] == "ended well\n"


def each(embryo, restores):
    return [Rebuilding(embryo, task, restore, embryo.pid) for task, restore in restores]


def test_each_has_its_own_number_of_rounds(embryo):
    said = []
    tasks = list(embryo.tasks.values())
    run_in_rounds(
        each(embryo, [(task, counting(task, n % 7, said)) for n, task in enumerate(tasks)])
    )
    wanted = [(task.tid, m, True) for n, task in enumerate(tasks) for m in range(n % 7)]
    assert sorted(said) == sorted(wanted)
    rounds = [number for _, number, _ in said]
    assert rounds == sorted(rounds), "a round is of all threads"


def test_one_after_the_other_for_each_thread(embryo):
    said = []
    task = embryo.leader
    run_in_rounds(each(embryo, [(task, in_order([counting(task, n, said) for n in (2, 0, 1)]))]))
    assert [number for _, number, _ in said] == [0, 1, 0]


def test_a_failure_is_told_at_once(embryo):
    said = []
    restores = [(task, counting(task, 5, said)) for task in embryo.tasks.values()]
    restores[3] = restores[3][0], failing()
    with pytest.raises(RestoreFailed, match="a step"):
        run_in_rounds(each(embryo, restores))
    assert {number for _, number, _ in said} == {0}


def test_a_queued_signal_is_not_taken_for_the_end_of_a_batch(embryo):
    """It stays queued with all that came with it, although only its own thread could tell."""
    others = [task for task in embryo.tasks.values() if task is not embryo.leader][:3]
    info = (
        signal.SIGWINCH.to_bytes(4, "little") + bytes(4) + (-1 & 0xFFFFFFFF).to_bytes(4, "little")
    )
    info = info.ljust(128, b"\0")
    before = {task.tid: task.sigmask for task in others}

    def queue(task):
        task.reserved |= 1 << (signal.SIGWINCH - 1)
        tgid = embryo.arena.tgid
        yield [call(NR.rt_tgsigqueueinfo, tgid, task.tid, signal.SIGWINCH, In(info))]

    for task in others:
        task.sigmask |= 1 << (signal.SIGWINCH - 1)
    restores = [(task, in_order([queue(task), counting(task, 2, [])])) for task in others]
    run_in_rounds(each(embryo, restores))
    for task in others:
        assert ptrace.peek_siginfo(task.tid, shared=False) == [info]
        task.sigmask = before[task.tid]
        task.disturbed = True
