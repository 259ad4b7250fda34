"""The promise: every ending of a command has its exit code, and says one sentence at most once."""

import json
import os
import subprocess
import sys
import textwrap
from types import ModuleType

import click
import pytest

import ckpt.cli.main
from ckpt.cli.main import COMMANDS, LazyGroup, run
from ckpt.cli.output import emit_json, json_option, say
from ckpt.errors import Finding, PidTaken, UnsupportedState, UsageError
from ckpt.units import Pid


@pytest.fixture
def ckpt_with(monkeypatch):
    """Make a group of one command `job`, whose body is the given function."""

    def make(body):
        @click.command
        @click.option("--pid", type=int)
        @click.argument("extra", nargs=-1)
        @json_option
        def command(**options):
            return body(**options)

        module = ModuleType("fake_commands.job")
        module.command = command
        monkeypatch.setitem(sys.modules, "fake_commands", ModuleType("fake_commands"))
        monkeypatch.setitem(sys.modules, "fake_commands.job", module)
        return LazyGroup(
            package="fake_commands", summaries={"job": "Do it."}, name="ckpt", help="Help."
        )

    return make


def raises(error):
    def body(**_):
        raise error

    return body


def test_a_command_without_a_result_succeeds(ckpt_with, capsys):
    assert run(ckpt_with(lambda **_: None), ["job"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("code", [0, 3, 137])
def test_a_command_returns_its_exit_code(ckpt_with, code):
    assert run(ckpt_with(lambda **_: code), ["job"]) == code


def test_a_result_in_json_is_one_line(ckpt_with, capsys):
    assert run(ckpt_with(lambda **_: emit_json({"pid": 7, "name": "é\n"})), ["job", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert json.loads(out) == {"pid": 7, "name": "é\n"}
    assert err == ""


def test_trouble_is_one_sentence_and_its_exit_code(ckpt_with, capsys):
    error = PidTaken(pid=Pid(7), holder="sh")
    assert run(ckpt_with(raises(error)), ["job"]) == 41
    assert capsys.readouterr() == (
        "",
        "ckpt: pid 7 is taken by sh: end it, or wait until it is reaped (or use --new-pids)\n",
    )


def test_trouble_in_json_is_an_object_beside_the_sentence(ckpt_with, capsys):
    error = UnsupportedState(pid=Pid(7), findings=(Finding("fd 3", "is an inotify"),))
    assert run(ckpt_with(raises(error)), ["job", "--json"]) == 21
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "error": {
            "code": "unsupported-state",
            "message": "process 7 cannot be checkpointed, and was not touched:\n"
            "  fd 3: is an inotify",
            "exit_code": 21,
        }
    }
    assert err.startswith("ckpt: process 7 cannot be checkpointed")


@pytest.mark.parametrize(
    "args",
    [["jib"], ["job", "--pid", "seven"], ["job", "--nonsense"], ["--nonsense"], ["job", "--pid"]],
)
def test_a_wrong_command_line_is_one_sentence(ckpt_with, capsys, args):
    assert run(ckpt_with(raises(AssertionError())), args) == UsageError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ckpt: ")
    assert err.count("\n") == 1
    assert "--help)" in err


def test_a_wrong_command_line_is_told_in_json_too(ckpt_with, capsys):
    assert run(ckpt_with(raises(AssertionError())), ["job", "--nonsense", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["exit_code"]) == ("usage", 2)
    assert "--nonsense" in error["message"]


def test_what_stands_after_two_dashes_is_no_option(ckpt_with, capsys):
    assert run(ckpt_with(raises(UsageError("no"))), ["job", "--", "--json"]) == 2
    assert capsys.readouterr() == ("", "ckpt: no\n")


def test_no_command_at_all_shows_the_help(ckpt_with, capsys):
    assert run(ckpt_with(raises(AssertionError())), []) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Do it." in err


def test_a_bug_shows_its_traceback(ckpt_with, capsys):
    assert run(ckpt_with(raises(ZeroDivisionError("by zero"))), ["job", "--json"]) == 70
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["exit_code"] == 70
    assert "Traceback (most recent call last)" in err
    assert "ZeroDivisionError: by zero (this is a bug" in err


def test_a_broken_pipe_that_is_not_ours_is_a_bug(ckpt_with, capfd):
    assert run(ckpt_with(raises(BrokenPipeError(32, "Broken pipe"))), ["job"]) == 70
    assert "BrokenPipeError" in capfd.readouterr().err


def test_an_interrupted_command_says_so(ckpt_with, capsys):
    assert run(ckpt_with(raises(KeyboardInterrupt())), ["job"]) == 130
    assert capsys.readouterr() == ("", "ckpt: interrupted\n")


def test_help_imports_no_command(ckpt_with, capsys, monkeypatch):
    group = ckpt_with(raises(AssertionError()))
    monkeypatch.setitem(sys.modules, "fake_commands.job", None)
    assert run(group, ["--help"]) == 0
    assert "Do it." in capsys.readouterr().out


def test_the_command_is_imported_when_asked_for(ckpt_with, monkeypatch, capsys):
    group = ckpt_with(raises(AssertionError()))
    monkeypatch.setitem(sys.modules, "fake_commands.job", None)
    assert run(group, ["job"]) == 70
    assert "fake_commands.job" in capsys.readouterr().err


def test_a_module_whose_command_is_none_is_a_bug(ckpt_with, monkeypatch, capsys):
    group = ckpt_with(raises(AssertionError()))
    monkeypatch.setattr(sys.modules["fake_commands.job"], "command", print)
    assert run(group, ["job"]) == 70
    assert "is no click command" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.2.3 of {name}")
    assert run(ckpt.cli.main.cli, ["--version"]) == 0
    assert capsys.readouterr().out == "ckpt 1.2.3 of ckpt\n"


def test_the_help_names_every_command(capsys):
    assert run(ckpt.cli.main.cli, ["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


PROGRAM = """
import sys
from types import ModuleType
import click
from ckpt.cli.main import LazyGroup, run
from ckpt.cli.output import emit_json, json_option, say

@click.command
@json_option
def command(as_json):
    sys.stdin.read()
    for number in range(100_000):
        say(f"line {number}")

module = sys.modules["c.job"] = ModuleType("c.job")
sys.modules["c"] = ModuleType("c")
module.command = command
sys.exit(run(LazyGroup(package="c", summaries={"job": ""}, name="ckpt", help=""), sys.argv[1:]))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return [sys.executable, str(path), "job", "--json"], environment


def test_a_reader_that_goes_away_ends_it_quietly(program):
    command, environment = program
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        ended = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=write_fd,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write_fd)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_output_that_cannot_be_written_is_the_users_trouble(program):
    command, environment = program
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 13
    assert ended.stderr.startswith(
        "ckpt: cannot write to standard output (No space left on device)"
    )
    assert ended.stderr.count("\n") == 1


def test_closed_output_harms_nothing(ckpt_with, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run(ckpt_with(lambda **_: say("unheard")), ["job"]) == 0
