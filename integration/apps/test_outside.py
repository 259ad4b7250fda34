"""Shells whose descriptors lead outside the tree: they go on with what the restore is given."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from integration.errors.refusals import refused, untouched
from integration.harness import Restored, become_subreaper, ckpt, dump
from integration.workloads.driver import ANSWER_S, Dialogue

BLOCK = """
{
    while read -r line; do
        echo "$line"; echo "got $line" >&2
        [ "$line" != end ] || break
    done
} >out
echo "wrote $(wc -l <out) lines"
"""
"""While the block runs, the shell has put its standard output aside, under number 10."""
MEMBER = """
while read -r -u 5 line; do sum=$((sum + line)); echo $sum; done
echo "ended at $sum"
"""
"""Adds up what comes from a pipe whose other end is in the test."""
become_subreaper()


def start(script, cwd, shell="dash", **more):
    return subprocess.Popen(
        [shell, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd, **more
    )


def await_reading(pid):
    """Return when a process waits in read(2) of its standard input."""
    deadline = time.monotonic() + ANSWER_S
    while not Path(f"/proc/{pid}/syscall").read_text().startswith("0 0x0 "):
        assert time.monotonic() < deadline
        os.sched_yield()


def end(process):
    process.wait(ANSWER_S)
    for file in (process.stdin, process.stdout, process.stderr):
        if file:
            file.close()


def speak(process, answers):
    return Dialogue(process.stdin.fileno(), answers.fileno())


def test_a_block_whose_output_goes_elsewhere_ends_where_it_belongs(tmp_path):
    image = tmp_path / "image"
    shell = start(BLOCK, tmp_path, stderr=subprocess.PIPE)
    assert speak(shell, shell.stderr).ask("one") == "got one"
    await_reading(shell.pid)
    key = os.readlink(f"/proc/{shell.pid}/fd/10")
    with untouched(shell.pid):
        message = refused(21, "dump", "--pid", shell.pid, image)
        assert f"fd 10 ({key}): is a pipe whose other end is in another process" in message
        assert f"--external '{key}'" in message
        assert ckpt("check", "--pid", shell.pid, "--external", key).returncode == 0
    assert dump(shell.pid, image, "--external", key)["kind"] == "full"
    assert speak(shell, shell.stderr).ask("two") == "got two"
    assert dump(shell.pid, image, "--external", key, "--kill")["kind"] == "delta"
    end(shell)
    assert f"--inherit '{key}=FD'" in refused(42, "restore", image)
    assert f"--inherit '{key}=FD'" in ckpt("show", image).stdout
    reader, writer = os.pipe()
    with (
        open(reader) as output,
        Restored(image, "--inherit", f"{key}={writer}", pass_fds=(writer,)) as back,
    ):
        os.close(writer)
        errors = speak(back.process, back.process.stderr)
        errors.tell("three")
        while (line := errors.line()) != "got three":
            assert line.startswith("ckpt: ")  # what it says of standard streams
        errors.tell("end")
        assert output.read() == "wrote 4 lines\n"
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\nend\n"


@pytest.mark.parametrize("declared", ["auto", "by its name"])
def test_a_pipe_that_somebody_outside_fills(declared, tmp_path):
    image = tmp_path / "image"
    reader, writer = os.pipe()
    number_5 = f"exec 5<&{reader} {reader}<&-\n"
    member = start(number_5 + MEMBER, tmp_path, shell="bash", pass_fds=(reader,))
    os.close(reader)
    answers = Dialogue(writer, member.stdout.fileno())
    assert [answers.ask("3"), answers.ask("4")] == ["3", "7"]
    key = os.readlink(f"/proc/{member.pid}/fd/5")
    dump(member.pid, image, "--external", "auto" if declared == "auto" else key, "--kill")
    end(member)
    os.close(writer)
    reader, writer = os.pipe()
    with Restored(image, "--inherit", f"{key}={reader}", pass_fds=(reader,)) as back:
        os.close(reader)
        os.write(writer, b"5\n6\n")
        assert [back.line(), back.line()] == ["12", "18"]
        os.close(writer)
        assert back.line() == "ended at 18"
