"""The promise: whatever ends a command under `ckpt run`, the same line lets it go on."""

import contextlib
import json
import os
import random
import shutil
import signal

import pytest

from ckpt.image.chain import Chain
from ckpt.image.verify import verify
from integration.errors.test_restores import sleeping_as
from integration.harness import become_subreaper, ckpt
from integration.process.test_killed_tracer import let_pass
from integration.run.supervised import NEVER, OFTEN, Supervised, is_of, line

become_subreaper()

WRITER = line("writer", "--mib", "4", "--threads", "1", "--rate", "2000")
N_KILLS = 5
LONGEST_S = 0.2
"""Two checkpoints fit into it, so that a kill comes at any moment of one."""


def n_done(stats):
    return sum(int(word.partition("=")[2]) for word in stats.split()[1:])


def started(image, cwd, *options):
    """Start the writer with a job of its own, up to its first checkpoint."""
    with contextlib.ExitStack() as at_failure:
        work = at_failure.enter_context(Supervised(WRITER, image, *options, cwd=cwd))
        assert work.answer() == "ready"
        at_failure.pop_all()
    return work


def checkpointed(work):
    work.signal(signal.SIGUSR1)
    return work.event("checkpoint")["generation"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_loses_nothing(number, tmp_path):
    image = tmp_path / "image"
    with started(image, tmp_path, *NEVER) as work:
        assert work.ask("step") == "stepped"
        assert work.ask("pause") == "paused"
        before = work.ask("stats")
        work.signal(number)
        stopped = work.event("stopped")
        assert (stopped["generation"], stopped["exit_code"]) == (0, 75)
        assert work.wait() == 75
        assert not is_of(work.root, WRITER)
    with Supervised(WRITER, image, *NEVER, cwd=tmp_path) as work:
        assert work.event("restored", "started")["event"] == "restored"
        assert work.ask("stats") == before
        assert work.ask("resume") == "resumed"
        assert work.ask("check") == "ok"
        work.tell("quit")
        assert work.event("ended")["exit_code"] == 0
        assert work.wait() == 0


def test_kills_at_random_moments_of_it_and_of_ckpt(tmp_path):
    chance = random.Random("run")
    image = tmp_path / "image"
    chain, at_least, n_takeovers = None, 0, 0
    for turn in range(N_KILLS):
        with Supervised(WRITER, image, *OFTEN, cwd=tmp_path) as work:
            if chain is None:
                assert work.answer() == "ready"
                chain = image
            else:
                newest = Chain.open(image).newest()
                back = work.event("restored", "started")
                assert (back["event"], back["generation"]) == ("restored", newest), turn
                assert work.ask("check") == "ok"
            done = n_done(work.ask("stats"))
            assert done >= at_least, turn
            work.event("checkpoint")
            at_least = done
            let_pass(chance.uniform(0, LONGEST_S))
            assert work.ask("check") == "ok"
            if turn % 2:
                os.kill(work.root, signal.SIGKILL)
                assert work.event("ended")["exit_code"] == 137
                assert work.wait() == 137
                continue
            work.kill()
            if turn % 4:
                os.kill(work.root, signal.SIGKILL)
                continue
            assert is_of(work.root, WRITER)
            with Supervised(WRITER, image, *OFTEN, cwd=tmp_path) as heir:
                taken = heir.event("taken-over", "started", "restored")
                assert taken == taken | {"event": "taken-over", "pid": work.root}, turn
                assert heir.event("restored")["generation"] == taken["generation"]
                assert heir.ask("check") == "ok"
                assert n_done(heir.ask("stats")) >= at_least
                n_takeovers += 1
                heir.signal(signal.SIGTERM)
                assert heir.wait() == 75
    assert n_takeovers
    assert verify(Chain.open(image)) == []


def flip_bit(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


def test_what_is_damaged_is_passed_over(tmp_path):
    image = tmp_path / "image"
    with started(image, tmp_path, *NEVER, "--checkpoint-on", "SIGUSR1") as work:
        for number in range(4):
            assert checkpointed(work) == number
            assert work.ask("step") == "stepped"
        work.kill()
        os.kill(work.root, signal.SIGKILL)
    flip_bit(image / "gen-000003" / "manifest", 40)
    flip_bit(image / "gen-000002" / "pages-0", 40)
    with Supervised(WRITER, image, *NEVER, "--checkpoint-on", "USR1", cwd=tmp_path) as work:
        passed = [work.event("passed-over")["generation"] for _ in range(2)]
        assert passed == [3, 2]
        assert work.event("restored")["generation"] == 1
        assert work.ask("check") == "ok"
        assert checkpointed(work) == 4
        work.signal(signal.SIGTERM)
        assert work.event("stopped")["generation"] == 5
        assert "generation 3 is passed over: " in work.said_at_end()
    with Supervised(WRITER, image, *NEVER, cwd=tmp_path) as work:
        assert work.event("restored")["generation"] == 5
        assert work.ask("check") == "ok"


def test_that_the_newest_was_taken_away_is_told(tmp_path):
    image = tmp_path / "image"
    with started(image, tmp_path, *NEVER, "--checkpoint-on", "SIGUSR1") as work:
        assert [checkpointed(work) for _ in range(2)] == [0, 1]
        work.signal(signal.SIGTERM)
        assert work.event("stopped")["generation"] == 2
    shutil.rmtree(image / "gen-000002")
    with Supervised(WRITER, image, *NEVER, "--checkpoint-on", "SIGUSR1", cwd=tmp_path) as work:
        assert work.event("gone", "restored")["generation"] == 2
        assert work.event("restored")["generation"] == 1
        assert work.ask("check") == "ok"
        assert checkpointed(work) == 3, "no number is given twice"
        work.signal(signal.SIGTERM)
        assert work.wait() == 75
        assert "generation 2 was here, and is gone" in work.said_at_end()
    with Supervised(WRITER, image, *NEVER, cwd=tmp_path) as work:
        assert work.event("gone", "restored")["event"] == "restored"


def test_the_newest_checkpoints_are_kept(tmp_path):
    image = tmp_path / "image"
    options = (*NEVER, "--keep", "2", "--checkpoint-on", "SIGUSR1")
    with started(image, tmp_path, *options) as work:
        for number in range(4):
            work.signal(signal.SIGUSR1)
            made = work.event("checkpoint")
            assert made["generation"] == number
            assert made["removed"] == [number - 2] * (number > 1)
            # A delta goes on from what was merged.
            assert made["kind"] == ("delta" if number else "full")
            assert work.ask("step") == "stepped"
        work.kill()
        os.kill(work.root, signal.SIGKILL)
    chain = Chain.open(image)
    assert chain.generations() == [2, 3]
    assert verify(chain) == []
    with Supervised(WRITER, image, *NEVER, cwd=tmp_path) as work:
        assert work.event("restored")["generation"] == 3
        assert work.ask("check") == "ok"


def test_if_nothing_is_whole_it_does_not_start_over_by_itself(tmp_path):
    image = tmp_path / "image"
    with started(image, tmp_path, *NEVER) as work:
        work.signal(signal.SIGTERM)
        assert work.wait() == 75
    flip_bit(image / "gen-000000" / "pages-0", 40)
    done = ckpt("run", image, "--", *WRITER, cwd=tmp_path)
    assert done.returncode == 30
    assert "none of its 1 generations can be used" in done.stderr
    with Supervised(WRITER, image, *NEVER, "--again", cwd=tmp_path) as work:
        assert work.event("started", "restored")["event"] == "started"
        assert work.answer() == "ready"
        work.signal(signal.SIGTERM)
        assert work.event("stopped")["generation"] == 1


def test_after_a_reboot_a_pid_that_is_taken_is_no_obstacle(tmp_path):
    image = tmp_path / "image"
    with started(image, tmp_path, *NEVER) as work:
        pid = work.event("started")["pid"]
        work.signal(signal.SIGTERM)
        assert work.wait() == 75
    with sleeping_as(pid):
        refused = ckpt("run", image, "--", *WRITER, cwd=tmp_path)
        assert refused.returncode == 41
        note = image / "run.json"
        note.write_text(json.dumps(json.loads(note.read_text()) | {"boot_id": "another"}))
        with Supervised(WRITER, image, *NEVER, cwd=tmp_path) as work:
            assert work.event("restored")["pid"] != pid
            assert work.ask("check") == "ok"
