"""Who has stopped is told once, with the word that waitpid would give; an end is never taken."""

import os
import signal

import pytest

from ckpt.kernel import ptrace
from ckpt.kernel.ptrace_burst import PtraceBurst, StopBurst
from tests.kernel.children import running

N_CHILDREN = 3
WAITING = "say('ready'); wait()"


@pytest.fixture
def children():
    with running(WAITING) as first, running(WAITING) as second, running(WAITING) as third:
        of_all = [first, second, third]
        for child in of_all:
            child.heard()
        yield [child.pid for child in of_all]


def seize(pids, *, interrupt=True):
    burst = PtraceBurst()
    for pid in pids:
        burst.seize(pid, ptrace.Option.NONE)
        if interrupt:
            burst.interrupt(pid)
    assert set(burst.run()) == {0}


def take_all(stops, n):
    words = {}
    while len(words) < n:
        words |= stops.take()
    return words


def test_each_stop_is_told_once(children):
    seize(children)
    stops = StopBurst(children)
    words = take_all(stops, N_CHILDREN)
    assert sorted(words) == sorted(children)
    kinds = {ptrace.parse_wait_status(pid, word).kind for pid, word in words.items()}
    assert kinds == {ptrace.Kind.INTERRUPTED}
    assert stops.take() == {}


def test_the_word_says_which_signal(children):
    seize(children, interrupt=False)
    for pid in children:
        os.kill(pid, signal.SIGUSR1)
    words = take_all(StopBurst(children), N_CHILDREN)
    assert set(words.values()) == {ptrace.word_of_stop(signal.SIGUSR1)}
    status = ptrace.parse_wait_status(children[0], words[children[0]])
    assert (status.kind, status.sig) == (ptrace.Kind.SIGNAL, signal.SIGUSR1)


def test_an_end_is_left_to_whoever_waits_for_it(children):
    seize(children)
    stops = StopBurst(children)
    take_all(stops, N_CHILDREN)
    os.kill(children[0], signal.SIGKILL)
    seen = os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOWAIT)
    assert seen.si_pid == children[0]
    assert stops.take() == {}
    assert os.waitpid(children[0], 0) == (children[0], signal.SIGKILL)


def test_one_that_is_not_ours_is_never_told():
    assert StopBurst([1]).take() == {}
    assert StopBurst([]).take() == {}
