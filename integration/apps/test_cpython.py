"""CPython with eight threads: numpy arrays that are computed on, naps, and long sleeps.

The sleeps are timed by this test's own clock too. While the process is away its clock stands still,
so of N seconds what had passed at the checkpoint must be left out afterwards, no more and no less.
"""

import json
import sys
import time

import pytest

from integration.apps.app import (
    PROGRAMS,
    App,
    Costs,
    is_running,
    kind_of_further_dumps,
    offered_trackers,
)
from integration.harness import Restored, become_subreaper, dump
from integration.workloads.driver import ANSWER_S

WAYS_TO_SLEEP = {"time.sleep", "condition", "select"}
LATE = 0.4
"""How much too long a sleep may be: five threads compete for the interpreter's lock."""
become_subreaper()


def start(cwd):
    app = App([sys.executable, PROGRAMS / "numeric.py"], cwd)
    said = answer(app, "ready")
    assert said["ready"] == 9, "the main thread and eight more"
    return app


def answer(program, key):
    """Return the next line that has `key`; progress comes in between at any time."""
    while True:
        said = json.loads(program.line())
        if key in said:
            return said


def ask(program, command, key):
    program.tell(command)
    return answer(program, key)


def check(program, mark):
    said = ask(program, "check", "check")
    assert said["check"] == "ok"
    assert said["mark"] == mark
    return said["steps"]


def check_all_go_on(program, mark, before):
    """Check until every thread is further than `before`; return how far they are."""
    deadline_s = time.monotonic() + ANSWER_S
    while True:
        steps = check(program, mark)
        assert all(left <= right for left, right in zip(before, steps, strict=True))
        if all(left < right for left, right in zip(before, steps, strict=True)):
            return steps
        assert time.monotonic() < deadline_s, f"some thread stands still: {before} -> {steps}"


@pytest.mark.parametrize("tracker", offered_trackers())
def test_threads_go_on_computing(tracker, tmp_path, record_property):
    image = tmp_path / "image"
    costs = Costs(record_property, f"cpython, {tracker}")
    steps = [[0] * 5]
    with start(tmp_path) as program:
        for nth in range(4):
            ask(program, f"mark {nth}", "mark")
            steps.append(check_all_go_on(program, str(nth), steps[-1]))
            dumped = dump(program.pid, image, "--tracker", tracker)
            assert dumped["kind"] == (kind_of_further_dumps(tracker) if nth else "full")
            costs.note(dumped)
        check_all_go_on(program, "3", steps[4])
    assert not is_running(program.pid)

    with Restored(image) as back:
        costs.note_restore(back.said)
        check_all_go_on(back, "3", steps[4])
        ask(back, "mark back", "mark")
        steps.append(check_all_go_on(back, "back", steps[4]))
        assert dump(back.pid, image, "--tracker", tracker)["kind"] == dumped["kind"]
    with Restored(image, "--at", "1") as back:
        check_all_go_on(back, "1", steps[2])
        assert back.quit() == 0
    with Restored(image) as back:
        check_all_go_on(back, "back", steps[5])
        assert back.quit() == 0


def times_slept(program):
    """Return when each sleep ended by our clock, and how long it took by the program's."""
    ended_s, took_s = {}, {}
    while len(ended_s) < len(WAYS_TO_SLEEP):
        said = answer(program, "slept")
        ended_s[said["slept"]] = time.monotonic()
        took_s[said["slept"]] = said["took_s"]
    assert set(ended_s) == WAYS_TO_SLEEP
    return ended_s, took_s


def assert_on_time(took_s, seconds):
    latest_s = seconds * (1 + LATE)
    assert {how: took for how, took in took_s.items() if not seconds <= took < latest_s} == {}


def sleep_through_a_dump(program, seconds, image, *options):
    """Return when (on our clock) the sleeps began and the dump began and ended: pairs of bounds.

    The dump begins so late that to sleep all the time once more after a restore would be too long.
    """
    before_s = time.monotonic()
    ask(program, f"sleep {seconds}", "sleeping")
    asleep_s = time.monotonic()
    while time.monotonic() < asleep_s + seconds * LATE:
        answer(program, "progress")
    dumping_s = time.monotonic()
    dump(program.pid, image, *options)
    dumped_s = time.monotonic()
    # The living sleep on.
    assert_on_time(times_slept(program)[1], seconds)
    return (before_s, asleep_s), (dumping_s, dumped_s)


@pytest.mark.parametrize("tracker", offered_trackers())
def test_sleeps_take_as_long_as_they_should(tracker, tmp_path):
    image = tmp_path / "image"
    with start(tmp_path) as program:
        dump(program.pid, image, "--tracker", tracker)
        for seconds in (5.0, 10.0, 20.0):
            began, dumped = sleep_through_a_dump(program, seconds, image, "--tracker", tracker)
            if dumped[1] - began[0] < seconds:
                break  # else the machine is too busy: the dump may have come after the sleep

    before_restore_s = time.monotonic()
    with Restored(image) as back:
        restored_s = time.monotonic()
        ended_s, took_s = times_slept(back)
        assert_on_time(took_s, seconds)
        check(back, "")
        assert back.quit() == 0
    for how, end_s in ended_s.items():
        at_most_s = (dumped[1] - began[0]) + (end_s - before_restore_s)
        at_least_s = (dumped[0] - began[1]) + (end_s - restored_s)
        assert at_most_s >= seconds, f"{how} returned early"
        assert at_least_s < seconds * (1 + LATE), f"{how} returned late"
