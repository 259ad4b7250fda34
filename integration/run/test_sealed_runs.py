"""The promise: what `ckpt run` writes may be encrypted; nothing is ended that no key brings back.

And the rest that a dump and a restore can be told is told to `ckpt run` alike.
"""

import os
import signal

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ckpt.image.access import Access
from ckpt.image.chain import Chain
from ckpt.image.keys import PrivateKey, write_private_key
from ckpt.image.verify import verify
from integration.errors.refusals import unchanged
from integration.harness import become_subreaper, ckpt
from integration.run.supervised import NEVER, Supervised, is_of, line

become_subreaper()

KEY = PrivateKey.generate()
SEALED = ("--encrypt-to", str(KEY.recipient))
WRITER = line("writer", "--mib", "4", "--threads", "1", "--rate", "2000")
BY_HAND = (*NEVER, "--checkpoint-on", "SIGUSR1")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "ours"
    write_private_key(file, KEY)
    return "--identity", str(file)


def refused(code, *options, command):
    """Return the one sentence with which `ckpt run` refuses to start a command."""
    done = ckpt("run", *options, "--", *command)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def checkpointed(work):
    work.signal(signal.SIGUSR1)
    return work.event("checkpoint", "checkpoint-failed")


def kinds(image):
    chain = Chain.open(image)
    return {number: str(chain.manifest(number).kind) for number in chain.generations()}


def test_it_is_started_without_the_key_and_brought_back_with_it(tmp_path, ours):
    image = tmp_path / "image"
    with Supervised(WRITER, image, *NEVER, *SEALED, cwd=tmp_path) as work:
        said = work.event("no-identity", "started")["message"]
        assert f"encrypted to {KEY.recipient}, and there is no --identity" in said
        assert work.answer() == "ready"
        work.signal(signal.SIGTERM)
        assert work.wait() == 75
        assert "the same line with --identity goes on from generation 0" in work.said_at_end()
    with unchanged(image):
        said = refused(37, *NEVER, *SEALED, image, command=WRITER)
    assert "the command is to be brought back from it: give --identity" in said
    with Supervised(WRITER, image, *NEVER, *ours, cwd=tmp_path) as work:
        assert work.event("restored", "no-identity", "started")["generation"] == 0
        assert work.ask("check") == "ok"
        work.tell("quit")
        assert work.wait() == 0


def test_what_still_runs_is_left_alone_without_the_key(tmp_path, ours):
    image = tmp_path / "image"
    with Supervised(WRITER, image, *NEVER, *SEALED, cwd=tmp_path) as work:
        assert work.answer() == "ready"
        work.kill()
        with unchanged(image):
            said = refused(37, *NEVER, image, command=WRITER)
        assert f"the command still runs as process {work.root}, and is left alone" in said
        assert is_of(work.root, WRITER)
        with Supervised(WRITER, image, *NEVER, *SEALED, *ours, cwd=tmp_path) as heir:
            assert heir.event("taken-over", "started")["pid"] == work.root
            assert heir.event("restored")["generation"] == 0
            assert heir.ask("check") == "ok"


def test_without_the_key_whole_lineages_make_room(tmp_path, ours):
    image = tmp_path / "image"
    with Supervised(WRITER, image, *BY_HAND, *SEALED, "--keep", "2", cwd=tmp_path) as work:
        assert work.answer() == "ready"
        made = [checkpointed(work) for _ in range(5)]
        assert [one["kind"] for one in made] == ["full", "delta", "full", "delta", "full"]
        assert [one["removed"] for one in made] == [[], [], [], [0, 1], []]
        assert "cannot be merged without --identity" in made[2]["reason"]
        assert kinds(image) == {2: "full", 3: "delta", 4: "full"}
        work.signal(signal.SIGTERM)
        assert work.wait() == 75
    assert verify(Chain.open(image, Access(private=(KEY,)))) == []
    with Supervised(WRITER, image, *BY_HAND, *ours, "--keep", "2", cwd=tmp_path) as work:
        assert work.event("restored")["generation"] == 5
        assert work.ask("check") == "ok"
        assert [checkpointed(work)["kind"] for _ in range(2)] == ["delta", "delta"]
        assert kinds(image) == {6: "full", 7: "delta"}
        assert work.ask("check") == "ok"
    assert verify(Chain.open(image, Access(private=(KEY,)))) == []


def test_what_makes_no_sense_is_refused_before_anything_is_made(tmp_path, ours):
    image, ran = tmp_path / "image", tmp_path / "ran"
    command = ("touch", ran)
    failing = ("--restart", "on-failure")
    said = refused(2, *SEALED, *failing, image, command=command)
    assert "give --identity with the file of the private key, too" in said
    other = str(PrivateKey.generate().recipient)
    said = refused(37, "--encrypt-to", other, *ours, image, command=command)
    assert "--identity has no private key of that" in said
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_others_is_refused_before_the_command_is_started(tmp_path):
    image, ran = tmp_path / "image", tmp_path / "ran"
    image.mkdir()
    image.chmod(0o777)
    said = refused(36, image, command=("touch", ran))
    assert "others than its owner can write to it" in said
    assert not ran.exists()
    command = ["sh", "-c", "echo ready; read x"]
    for first in ("started", "restored"):
        with Supervised(command, image, *NEVER, "--trust-image", cwd=tmp_path) as work:
            assert work.event("started", "restored")["event"] == first
            work.signal(signal.SIGTERM)
            assert work.wait() == 75


def figures_of(path):
    families = text_string_to_metric_families(path.read_text())
    return {one.name: one.value for family in families for one in family.samples}


def test_each_checkpoint_and_restore_is_measured(tmp_path):
    image, file = tmp_path / "image", tmp_path / "job.prom"
    how = (*BY_HAND, "--metrics", file)
    with Supervised(WRITER, image, *how, cwd=tmp_path) as work:
        assert work.answer() == "ready"
        for number in range(2):
            made = checkpointed(work)
            found = figures_of(file)
            assert (found["ckpt_generation"], found["ckpt_success"]) == (number, 1)
            assert found["ckpt_pages"] == made["pages"] > 0
            assert found["ckpt_freeze_seconds"] == pytest.approx(made["freeze_ms"] / 1000)
        with Chain.open(image).lock():
            assert checkpointed(work)["event"] == "checkpoint-failed"
        failed = figures_of(file)
        assert failed["ckpt_success"] == 0
        last = "ckpt_last_success_timestamp_seconds"
        assert failed[last] == found[last]
        work.signal(signal.SIGTERM)
        assert work.wait() == 75
    with Supervised(WRITER, image, *how, cwd=tmp_path) as work:
        assert work.event("restored")["generation"] == 2
        found = figures_of(file)
        assert (found["ckpt_generation"], found["ckpt_success"]) == (2, 1)
        assert found["ckpt_wall_seconds"] > 0


def test_it_comes_back_with_what_was_put_in_the_place_of_a_file(tmp_path):
    image, second = tmp_path / "image", tmp_path / "second"
    command = ["sh", "-c", "exec 7>first; echo ready; read x; echo $x >&7"]
    with Supervised(command, image, *NEVER, cwd=tmp_path) as work:
        assert work.answer() == "ready"
        work.signal(signal.SIGTERM)
        assert work.wait() == 75
    os.truncate(tmp_path / "first", 0)
    with Supervised(command, image, *NEVER, "--inherit", f"7={second}", cwd=tmp_path) as work:
        work.event("restored")
        work.tell("moved")
        assert work.event("ended")["exit_code"] == 0
        assert work.wait() == 0
    assert second.read_text() == "moved\n"
    assert (tmp_path / "first").read_text() == ""
