"""The promise: whenever a dump is killed, its target goes on, and no twin of it stays."""

import os
import random
import signal

from ckpt.engine.dump import DumpOptions, dump
from ckpt.image.chain import Chain
from ckpt.image.verify import verify
from integration.harness import Restored
from integration.live.moments import Moment, at
from integration.live.sweeping import Sweeper, wait_for_end
from integration.process.test_killed_tracer import let_pass, start

N_KILLS = 40
LONGEST_S = 0.3
ENDING_S = 20.0
"""A twin that was seized ends with us at once, and one that was not when it next looks for us; only
one that does not look sleeps for a minute."""
THROUGH_TWIN = DumpOptions(tracker="full", max_freeze_ms=0)
IN_ROUNDS = DumpOptions(incremental=True, max_freeze_ms=0)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dump_killed(pid, image, options, moment, turn):
    """Dump in a fork of ours that is killed at a moment."""
    child = os.fork()
    if child == 0:
        try:
            with at(moment, turn, die):
                dump(pid, image, options)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the dump never came to that moment"


def test_a_target_is_unharmed_when_a_dump_through_a_twin_is_killed(tmp_path):
    chance = random.Random("twin")
    counted = n_clones = 0
    while counted < N_KILLS:
        with Sweeper("--mib", "32", cwd=tmp_path) as target:
            assert target.ask("step") == "stepped"
            astray = False
            while counted < N_KILLS and not astray:
                pid = target.pid
                tracer = start(lambda: dump(pid, tmp_path / "image", THROUGH_TWIN))  # noqa: B023
                let_pass(chance.uniform(0, LONGEST_S))
                # Those moments are known, see there.
                astray = tracer.end(signal.SIGKILL)
                n_clones += target.await_clones(ENDING_S)
                if not astray:
                    target.expect_unharmed()
                    assert target.ask("check") == "ok", f"kill {counted}"
                    assert target.ask("step") == "stepped"
                    counted += 1
    print(f"{n_clones} clones were still there after {N_KILLS} kills, for a moment")
    image = Chain.open(tmp_path / "image")
    assert verify(image) == []


def test_a_twin_that_was_not_seized_yet_ends_too(tmp_path):
    with Sweeper("--mib", "32", cwd=tmp_path) as target:
        dump_killed(target.pid, tmp_path / "image", THROUGH_TWIN, Moment.SEIZING, 1)
        target.expect_unharmed()
        (twin,) = target.clones()
        assert target.ask("check") == "ok"
        assert wait_for_end(twin, ENDING_S)
        assert target.clones() == []


def test_what_is_armed_by_rounds_that_are_killed_is_not_believed(tmp_path):
    image = tmp_path / "image"
    with Sweeper("--mib", "32", cwd=tmp_path) as target:
        dump(target.pid, image, IN_ROUNDS)
        for moment, turn in [
            (Moment.ROUND, 1),
            (Moment.COPYING, 1),
            (Moment.STORING, 1),
            (Moment.ROUND, 2),
            (Moment.COPYING, 2),
            (Moment.FREEZING, 1),
            (Moment.COMMITTING, 1),
        ]:
            assert target.ask("step") == "stepped"
            dump_killed(target.pid, image, IN_ROUNDS, moment, turn)
            assert verify(Chain.open(image)) == []
            again = dump(target.pid, image, IN_ROUNDS)
            told = (again.kind == "full", bool(again.reason))
            # Before its first scan, a dump has changed nothing.
            assert told == ((False, False) if (moment, turn) == (Moment.ROUND, 1) else (True, True))
            assert target.ask("check") == "ok"
            target.expect_unharmed()
        newest = again.generation
    for generation in range(newest + 1):
        with Restored(image, "--at", str(generation)) as work:
            assert work.ask("check") == "ok"
