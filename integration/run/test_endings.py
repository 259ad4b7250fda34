"""The promise: a command under `ckpt run` ends as it would alone, and what is done stays done."""

import os
import signal
import subprocess

from integration.harness import CKPT, ckpt
from integration.run.supervised import NEVER, OFTEN, Supervised, line
from integration.workloads.driver import ANSWER_S

WRITER = line("writer", "--mib", "4", "--threads", "1", "--rate", "2000")
COUNTS = "n=$(cat runs 2>/dev/null || echo 0); echo $((n + 1)) > runs; "


def shell(text):
    return ["sh", "-c", text]


def run(image, text, *options, **more):
    done = ckpt("run", *options, image, "--", *shell(text), cwd=image.parent, **more)
    return done.returncode, done.stdout, done.stderr


def test_it_is_as_if_ckpt_was_not_there(tmp_path):
    text = "read x; echo $x; echo $x >&2; kill -9 $$"
    code, out, err = run(tmp_path / "image", text, stdin=None, input="é\n")
    assert (code, out) == (137, "é\n")
    assert err == "é\nckpt: the command was ended by SIGKILL\n"


def test_a_job_that_is_done_is_not_run_again(tmp_path):
    image = tmp_path / "image"
    assert run(image, COUNTS)[0] == 0
    code, _, err = run(image, COUNTS)
    assert code == 0
    assert "has finished" in err
    assert (tmp_path / "runs").read_text() == "1\n"
    code, _, err = run(image, "exit 1")
    assert code == 2
    assert f"is of another command (sh -c {COUNTS})" in err
    assert run(image, COUNTS, "--again")[0] == 0
    assert (tmp_path / "runs").read_text() == "2\n"


def test_a_job_that_failed_is(tmp_path):
    image = tmp_path / "image"
    assert run(image, f"{COUNTS} exit 5")[0] == 5
    code, _, err = run(image, f"{COUNTS} exit 5")
    assert code == 5
    assert "last time the command ended with exit status 5" in err
    assert (tmp_path / "runs").read_text() == "2\n"


def test_restarts_come_to_an_end(tmp_path):
    code, _, err = run(tmp_path / "image", f"{COUNTS} exit 5", "--restart", "on-failure")
    assert code == 5
    assert "in 5 restarts" in err
    assert (tmp_path / "runs").read_text() == "6\n"


def test_a_program_that_is_not_there_leaves_no_job(tmp_path):
    image = tmp_path / "image"
    done = ckpt("run", image, "--", "./nonesuch", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot start './nonesuch': No such file or directory" in done.stderr
    assert run(image, "exit 0")[0] == 0


def test_restarted_on_failure_it_goes_on_from_its_newest_checkpoint(tmp_path):
    image = tmp_path / "image"
    with Supervised(WRITER, image, *OFTEN, "--restart", "on-failure", cwd=tmp_path) as work:
        assert work.answer() == "ready"
        for _ in range(2):
            made = work.event("checkpoint")["generation"]
            os.kill(work.root, signal.SIGKILL)
            assert work.event("ended")["exit_code"] == 137
            back = work.event("started", "restored")
            assert back["event"] == "restored"
            assert back["generation"] >= made
            assert work.ask("check") == "ok"
        work.tell("quit")
        assert work.event("ended")["exit_code"] == 0
        assert work.wait() == 0


def test_a_signal_of_the_users_choice_takes_a_checkpoint(tmp_path):
    image = tmp_path / "image"
    options = (*NEVER, "--checkpoint-on", "SIGUSR1", "--checkpoint-on", "usr2")
    with Supervised(WRITER, image, *options, cwd=tmp_path) as work:
        assert work.answer() == "ready"
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
            work.signal(number)
            work.event("checkpoint")
        # The program has no handlers for these: they were not passed on.
        assert work.ask("check") == "ok"


def test_other_signals_are_passed_on(tmp_path):
    text = "trap 'echo got it; exit 4' USR1; echo ready; while read x; do :; done"
    with Supervised(shell(text), tmp_path / "image", *NEVER, cwd=tmp_path) as work:
        assert work.answer() == "ready"
        work.signal(signal.SIGUSR1)
        work.tell("x")
        assert work.answer() == "got it"
        assert work.wait() == 4


def test_told_twice_to_stop_it_does_not_wait_for_a_checkpoint(tmp_path):
    with Supervised(WRITER, tmp_path / "image", *NEVER, cwd=tmp_path) as work:
        assert work.answer() == "ready"
        work.signal(signal.SIGSTOP)
        # Both are there when it goes on.
        work.signal(signal.SIGTERM)
        work.signal(signal.SIGINT)
        work.signal(signal.SIGCONT)
        assert work.event("stopped")["generation"] is None
        assert work.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)


def test_a_dump_that_fails_harms_nobody(tmp_path):
    image = tmp_path / "image"
    ours, theirs = os.pipe()
    with Supervised(WRITER, image, *OFTEN, cwd=tmp_path, pass_fds=[theirs]) as work:
        os.close(theirs)
        assert work.answer() == "ready"
        for _ in range(2):
            failed = work.event("checkpoint", "checkpoint-failed")
            assert failed["error"]["code"] == "unsupported-state"
        assert work.ask("check") == "ok"
        work.signal(signal.SIGTERM)
        assert work.event("stopped")["generation"] is None
        assert work.wait() == 21
        said = work.said_at_end()
        assert said.count("a checkpoint could not be taken: ") == 1
        assert said.count("the last checkpoint could not be taken: ") == 1
    os.close(ours)


def test_one_directory_has_one_supervisor(tmp_path):
    image = tmp_path / "image"
    with Supervised(WRITER, image, *NEVER, cwd=tmp_path) as work:
        assert work.answer() == "ready"
        again = ckpt("run", image, "--", *WRITER, cwd=tmp_path)
        assert again.returncode == 35
        assert work.ask("check") == "ok"


def test_the_same_line_may_empty_the_file_that_its_output_goes_to(tmp_path):
    os.mkfifo(tmp_path / "ready")
    command = shell("echo first; echo > ready; read x; echo second")
    args = [*CKPT, "run", "--json", *NEVER, "image", "--", *command]
    out = tmp_path / "out"
    pipe = subprocess.PIPE
    with (
        out.open("w") as output,
        subprocess.Popen(args, cwd=tmp_path, stdin=pipe, stdout=output, stderr=output) as first,
    ):
        assert (tmp_path / "ready").read_text() == "\n"
        first.send_signal(signal.SIGTERM)
        assert first.wait(ANSWER_S) == 75
    assert "first\n" in out.read_text()
    with (
        out.open("w") as output,
        subprocess.Popen(args, cwd=tmp_path, stdin=pipe, stdout=output, stderr=output) as second,
    ):
        second.communicate(b"x\n", ANSWER_S)
        assert second.returncode == 0
    said = out.read_text()
    assert "second\n" in said
    assert "first\n" not in said
    assert "\0" not in said
