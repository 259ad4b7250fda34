"""Each workload without any checkpoint: it runs, it finds itself right, and it notices damage."""

from __future__ import annotations

import pytest

from integration.workloads.driver import Program

WRITERS = [
    [],
    ["--rate", "0", "--mib", "32", "--ops", "all,procmem"],
    ["--mib", "8", "--threads", "1", "--seed", "7"],
    ["--mib", "16", "--ops", "write"],
]


def assert_steps_and_damage(program: Program, steps: list[str]) -> None:
    assert program.ask("check") == "ok"
    for step in steps:
        assert program.ask(step) == "stepped"
        assert program.ask("check") == "ok", step
    assert program.ask("corrupt") == "corrupted"
    assert program.ask("check").startswith("FAIL ")
    assert program.quit() == 1


@pytest.mark.parametrize("arguments", WRITERS, ids=" ".join)
def test_the_writer_does_every_operation_and_stays_right(tmp_path, arguments):
    with Program("writer", *arguments, cwd=tmp_path) as writer:
        for _ in range(5):
            assert writer.ask("step") == "stepped"
            assert writer.ask("check") == "ok"
        stats = dict(pair.split("=") for pair in writer.ask("stats").split()[1:])
        idle = {name for name, count in stats.items() if count == "0"}
        asked = (
            set(arguments[arguments.index("--ops") + 1].split(","))
            if "--ops" in arguments
            else {"all"}
        )
        expected_idle = set(stats) - asked if "all" not in asked else {"procmem"} - asked
        assert idle == expected_idle
        assert writer.quit() == 0


def test_the_writer_notices_damage(tmp_path):
    with Program("writer", "--mib", "16", cwd=tmp_path) as writer:
        assert_steps_and_damage(writer, ["step", "step"])


def test_a_paused_writer_changes_nothing(tmp_path):
    with Program("writer", "--mib", "16", cwd=tmp_path) as writer:
        assert writer.ask("pause") == "paused"
        before = writer.ask("stats")
        assert writer.ask("stats") == before
        assert writer.ask("resume") == "resumed"
        assert writer.ask("step") == "stepped"
        assert writer.ask("stats") != before


def test_an_unknown_command_is_a_failure(tmp_path):
    with Program("writer", "--mib", "16", cwd=tmp_path) as writer:
        assert writer.ask("dance").startswith("FAIL ")
        assert writer.quit() == 1


def test_the_end_of_input_is_quit(tmp_path):
    with Program("writer", "--mib", "16", cwd=tmp_path) as writer:
        writer.process.stdin.close()
        assert writer.process.wait(30) == 0
