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

WAYS_TO_SLEEP = {"time.sleep", "condition", "select"}
LONG_S = 2.5
LATE_S = 1.0
"""Five threads compete for two processors and one interpreter lock: a wake-up takes a while."""
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


def all_later(before, after):
    return all(left < right for left, right in zip(before, after, strict=True))


@pytest.mark.parametrize("tracker", offered_trackers())
def test_threads_go_on_computing(tracker, tmp_path, record_property):
    image = tmp_path / "image"
    costs = Costs(record_property, f"cpython, {tracker}")
    steps = []
    with start(tmp_path) as program:
        for nth in range(4):
            ask(program, f"mark {nth}", "mark")
            answer(program, "progress")
            steps.append(check(program, str(nth)))
            dumped = dump(program.pid, image, "--tracker", tracker)
            assert dumped["kind"] == (kind_of_further_dumps(tracker) if nth else "full")
            costs.note(dumped)
        assert all_later(steps[3], check(program, "3")), "the dumps have stopped a thread"
    assert not is_running(program.pid)

    with Restored(image) as back:
        costs.note_restore(back.said)
        assert all_later(steps[3], check(back, "3"))
        ask(back, "mark back", "mark")
        answer(back, "progress")
        steps.append(check(back, "back"))
        assert dump(back.pid, image, "--tracker", tracker)["kind"] == dumped["kind"]
    with Restored(image, "--at", "1") as back:
        assert all_later(steps[1], check(back, "1"))
        assert back.quit() == 0
    with Restored(image) as back:
        assert all_later(steps[4], check(back, "back"))
        answer(back, "progress")
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


def assert_on_time(took_s):
    assert {how: took for how, took in took_s.items() if not LONG_S <= took < LONG_S + LATE_S} == {}


@pytest.mark.parametrize("tracker", offered_trackers())
def test_sleeps_take_as_long_as_they_should(tracker, tmp_path):
    image = tmp_path / "image"
    with start(tmp_path) as program:
        dump(program.pid, image, "--tracker", tracker)
        before_sleep_s = time.monotonic()
        ask(program, f"sleep {LONG_S}", "sleeping")
        asleep_s = time.monotonic()
        dump(program.pid, image, "--tracker", tracker)
        before_dump_s = time.monotonic()
        dump(program.pid, image, "--tracker", tracker)
        after_dump_s = time.monotonic()
        assert after_dump_s < asleep_s + LONG_S, "the checkpoint came too late to prove anything"
        # The living sleep on.
        assert_on_time(times_slept(program)[1])

    before_restore_s = time.monotonic()
    with Restored(image) as back:
        restored_s = time.monotonic()
        ended_s, took_s = times_slept(back)
        assert_on_time(took_s)
        check(back, "")
        assert back.quit() == 0
    for how, end_s in ended_s.items():
        at_most_s = (after_dump_s - before_sleep_s) + (end_s - before_restore_s)
        at_least_s = (before_dump_s - asleep_s) + (end_s - restored_s)
        assert at_most_s >= LONG_S, f"{how} returned early"
        assert at_least_s < LONG_S + LATE_S, f"{how} returned late"
