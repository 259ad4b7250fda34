"""`--log-level` and `--log-json`: steps with their times, never while a tree stands still."""

import json
import logging

import pytest

from ckpt.cli.main import COMMANDS, cli, run
from ckpt.engine.steps import LOGGER, Steps

NOWHERE = ["show", "/nowhere/at/all"]


@pytest.fixture
def heard(caplog):
    caplog.set_level(logging.INFO, LOGGER)
    return lambda: caplog.messages


def test_steps_are_told_with_what_came_of_them(heard, caplog):
    steps = Steps("dump")
    steps.done("looking", processes=3, reason="", parent=None, rounds=0)
    (record,) = caplog.records
    assert heard()[0].startswith("dump: looking took ")
    assert heard()[0].endswith(" ms processes=3 rounds=0")
    assert record.ms >= 0


def test_what_is_held_is_told_later_and_in_order(heard):
    steps = Steps("dump")
    with steps.held():
        steps.done("one")
        steps.done("two")
        assert heard() == []
    steps.done("three")
    assert [said.split()[1] for said in heard()] == ["one", "two", "three"]
    steps.release()
    assert len(heard()) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_log(command, capsys):
    assert run(cli, [command, "--help"]) == 0
    out = capsys.readouterr().out
    assert ("--log-level" in out, "--log-json" in out) == (True, True)


def test_an_error_is_json_too(capsys):
    assert run(cli, [*NOWHERE, "--log-json"]) == 30
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert told["level"] == "error"
    assert "no such directory" in told["message"]
    assert told["time"].endswith("Z")


def test_without_the_options_nothing_changes_and_nothing_is_left_behind(capsys):
    for options in (["--log-json"], ["--log-level", "info"], []):
        run(cli, [*NOWHERE, *options])
        said = capsys.readouterr().err
        assert said.startswith("ckpt: ") == ("--log-json" not in options)
    assert logging.getLogger(LOGGER).handlers == []
    assert logging.getLogger(LOGGER).propagate


def test_a_level_that_is_none(capsys):
    assert run(cli, [*NOWHERE, "--log-level", "loud"]) == 2
    assert "loud" in capsys.readouterr().err
