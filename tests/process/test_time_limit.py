"""A time limit ends what waits and what works, once, and nothing that must be finished."""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time

import pytest

from ckpt.errors import UsageError
from ckpt.process import time_limit as module
from ckpt.process.time_limit import TimeIsUp, time_limit
from ckpt.process.uninterrupted import alarms, uninterrupted

SOON_S = 0.01
NEVER_S = 3600.0


def wait_for_ever():
    threading.Event().wait()


def ring():
    signal.raise_signal(signal.SIGALRM)


def test_it_ends_what_waits_and_what_works():
    with pytest.raises(TimeIsUp), time_limit(SOON_S):
        wait_for_ever()
    with pytest.raises(TimeIsUp), time_limit(SOON_S):
        all(True for _ in itertools.count())


def test_all_is_as_before_afterwards():
    before = signal.getsignal(signal.SIGALRM)
    with contextlib.suppress(TimeIsUp), time_limit(SOON_S):
        wait_for_ever()
    with time_limit(NEVER_S):
        assert alarms
    with time_limit(None) as limit:
        assert signal.getsignal(signal.SIGALRM) is before
        limit.settle()
    assert signal.getsignal(signal.SIGALRM) is before
    assert not alarms


def test_steps_that_must_be_finished_are():
    finished = []

    def step_and_go_on():
        with uninterrupted():
            ring()
            finished.append(1)
        wait_for_ever()

    with pytest.raises(TimeIsUp), time_limit(NEVER_S):
        step_and_go_on()
    assert finished == [1]


def test_the_way_out_after_an_error_is_not_cut_short():
    finished = []

    def fail():
        try:
            raise ValueError("the error")
        finally:
            ring()
            finished.append(1)

    with pytest.raises(ValueError, match="the error"), time_limit(NEVER_S):
        fail()
    assert finished == [1]


def test_but_work_that_goes_on_after_one_is_when_it_rings_again():
    def fail_and_go_on():
        try:
            raise ValueError
        except ValueError:
            wait_for_signal()
        wait_for_ever()

    with pytest.raises(TimeIsUp), time_limit(SOON_S):
        fail_and_go_on()


def wait_for_signal():
    """Wait until a signal was taken."""
    reads, writes = os.pipe2(os.O_NONBLOCK)
    os.set_blocking(reads, True)
    before = signal.set_wakeup_fd(writes)
    try:
        os.read(reads, 1)
    finally:
        signal.set_wakeup_fd(before)
        os.close(reads)
        os.close(writes)


def test_a_caller_may_be_handling_an_error_himself():
    try:
        raise ValueError
    except ValueError:
        with pytest.raises(TimeIsUp), time_limit(SOON_S):
            wait_for_ever()


class Swallowing:
    def __del__(self):
        ring()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_is_lost_in_a_finalizer_is_found_before_the_end():
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with pytest.raises(TimeIsUp), time_limit(NEVER_S) as limit:
            Swallowing() and limit.settle()
    finally:
        sys.unraisablehook = hook


def test_it_is_never_over_once_settled():
    with time_limit(NEVER_S) as limit:
        limit.settle()
        ring()


def test_nonsense_is_refused():
    with pytest.raises(UsageError), time_limit(0):
        pass
    caught = []

    def elsewhere():
        try:
            with time_limit(SOON_S):
                pass
        except UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(caught) == 1


def in_child(work):
    """Return the exit code of a child that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_does_not_come_out_of_its_way_out_is_ended(monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", SOON_S)

    def stuck():
        with time_limit(SOON_S, if_stuck=lambda: os._exit(25)):
            try:
                wait_for_ever()
            finally:
                wait_for_ever()

    assert in_child(stuck) == 25


def test_what_is_settled_is_never_ended_so(monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", 0)

    def settled():
        with time_limit(SOON_S, if_stuck=lambda: os._exit(25)) as limit:
            limit.settle()
            until_s = time.monotonic() + 10 * SOON_S
            while time.monotonic() < until_s:
                pass
            os._exit(0)

    assert in_child(settled) == 0
