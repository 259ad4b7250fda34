"""Each workload without any checkpoint: it runs, it finds itself right, and it notices damage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from integration.workloads.build import build, names
from integration.workloads.catalog import (
    BLOCKING_ENDLESS,
    BLOCKING_RELEASED,
    BLOCKING_TIMED,
    DAMAGES,
    STATES,
    TRACKER_CASES,
    TREES,
    VARIANTS,
)
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


def changed(program: Program) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for word in program.ask("written").split():
        if word in {"written", "gone", "freed", "moved"}:
            pages = kinds[word] = []
        else:
            pages.append(int(word, 16))
    return kinds


@pytest.mark.parametrize(("case", "steps"), TRACKER_CASES.items(), ids=TRACKER_CASES)
def test_a_tracker_case_stays_right_and_notices_damage(tmp_path, case, steps):
    with Program("tracker_cases", case, cwd=tmp_path) as program:
        assert program.ask("steps").split()[1:] == steps
        named = [f"step {step}" for step in steps]
        assert_steps_and_damage(program, [*named, *["step"] * 30, *named[::-1]])


def test_a_tracker_case_names_the_pages_it_changed(tmp_path):
    with Program("tracker_cases", "t_dontneed", cwd=tmp_path) as program:
        assert changed(program) == {"written": [], "gone": [], "freed": [], "moved": []}
        program.ask("step one")
        pages = changed(program)
        assert len(pages["written"]) == 1
        assert pages["gone"] == []
        program.ask("step write")
        pages = changed(program)
        assert len(pages["gone"]) == 4
        assert set(pages["written"]) < set(pages["gone"])


def test_foreign_bytes_are_expected_page_by_page(tmp_path):
    with Program("tracker_cases", "t_foreign_write", cwd=tmp_path) as program:
        address, length, pattern = program.ask("where").split()
        assert int(length) == 64 * 4096
        with open(f"/proc/{program.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(int(address, 16) + 5 * 4096)
            memory.write(bytes([int(pattern, 16)]) * 4096)
        assert program.ask("check").startswith("FAIL pages page 5 ")
        assert program.ask(f"expect {pattern} 5") == "expected"
        assert program.ask("check") == "ok"


def test_freed_pages_really_go_when_the_kernel_reclaims(tmp_path):
    with Program("tracker_cases", "t_free", cwd=tmp_path) as program:
        program.ask("step reclaim")
        pages = changed(program)["freed"]
        with open(f"/proc/{program.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(pages[0])
            assert memory.read(4 * 4096) == bytes(4 * 4096)


def test_the_huge_case_has_huge_pages(tmp_path):
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    allowed = setting.exists() and "[never]" not in setting.read_text()
    with Program("tracker_cases", "t_thp", cwd=tmp_path) as program:
        assert program.ask("huge") == f"huge {4096 if allowed else 0}"


@pytest.mark.parametrize("case", [*BLOCKING_ENDLESS, *BLOCKING_RELEASED])
def test_a_blocked_thread_stays_blocked_until_it_is_released(tmp_path, case):
    with Program("blocking", case, cwd=tmp_path) as program:
        assert program.ask("peek") == "blocked"
        assert program.ask("peek") == "blocked"
        assert_steps_and_damage(program, ["step", "step"])


@pytest.mark.parametrize("case", BLOCKING_TIMED)
def test_a_timed_call_returns_at_its_deadline(tmp_path, case):
    with Program("blocking", case, "0.05", cwd=tmp_path) as program:
        assert program.ask("step") == "stepped"
        late_ns = int(program.ask("late").split()[1])
        assert 0 <= late_ns < 20e9
        assert program.ask("check") == "ok"
        assert program.quit() == 0


@pytest.mark.parametrize("case", BLOCKING_TIMED)
def test_an_interrupted_call_is_noticed(tmp_path, case):
    with Program("blocking", case, "3600", cwd=tmp_path) as program:
        assert program.ask("peek") == "blocked"
        assert program.ask("corrupt") == "corrupted"
        assert program.ask("peek") == "returned -1 4"
        assert program.ask("check").startswith("FAIL returned -4")


@pytest.mark.parametrize("name", STATES)
def test_a_state_program_finds_itself_right(tmp_path, name):
    with Program(name, cwd=tmp_path) as program:
        assert program.ask("steps").split()[1:] == STATES[name]
        assert program.ask("damages").split()[1:] == DAMAGES[name]
        assert program.ask("check") == "ok"
        assert program.ask("check") == "ok"
        for step in STATES[name] * 3:
            assert program.ask(f"step {step}") == "stepped"
            assert program.ask("check") == "ok", step
        assert program.quit() == 0


# (s_registers fails as well when told to damage what this processor does not have)
@pytest.mark.parametrize(
    ("name", "damage"), [(name, damage) for name in DAMAGES for damage in DAMAGES[name]]
)
def test_a_state_program_notices_each_damage(tmp_path, name, damage):
    with Program(name, cwd=tmp_path) as program:
        assert program.ask("check") == "ok"
        assert program.ask(f"corrupt {damage}") == "corrupted"
        assert program.ask("check").startswith("FAIL ")
        assert program.quit() == 1


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name in VARIANTS for variant in VARIANTS[name]]
)
def test_a_variant_of_a_state_program_is_right_too(tmp_path, name, variant):
    with Program(name, variant, cwd=tmp_path) as program:
        assert_steps_and_damage(program, [f"step {step}" for step in STATES[name]])


@pytest.mark.parametrize("damage", ["plain", "no_fork", "wiped", "unreachable"])
def test_the_sweeper_notices_damage_and_children(tmp_path, damage):
    with Program("sweeper", "--mib", "8", cwd=tmp_path) as program:
        assert program.ask("children") == "children none sigchld 0"
        assert program.ask("fork") == "forked"
        assert program.ask("children") == "children none sigchld 1"
        for _ in range(3):
            assert program.ask("step") == "stepped"
            assert program.ask("check") == "ok"
        assert program.ask(f"corrupt {damage}") == "corrupted"
        assert program.ask("check").startswith("FAIL ")
        assert program.quit() == 1


def test_the_catalogue_knows_every_program():
    assert set(names()) == {*STATES, *TREES, "writer", "blocking", "tracker_cases", "sweeper"}
    assert set(STATES) == set(DAMAGES)


def test_callers_at_the_same_time_build_one_binary(tmp_path, monkeypatch):
    monkeypatch.setenv("CKPT_WORKLOAD_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        binaries = set(pool.map(build, ["heartbeat"] * 4))
    assert len(binaries) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name[0] != "."] == [
        binaries.pop().name
    ]


# Those whose one range of pages stays where it is and holds still between commands.
MOVING = {"t_mremap", "t_tables", "t_free", "t_brk_stack", "t_full_speed", "t_exec"}
EXACT = sorted(set(TRACKER_CASES) - MOVING)


@pytest.mark.parametrize("case", EXACT)
def test_the_pages_a_case_names_are_those_whose_content_changed(tmp_path, case):
    with Program("tracker_cases", case, cwd=tmp_path) as program:
        address, length = program.ask("where").split()[:2]
        start, n_bytes = int(address, 16), int(length)

        def content() -> list[bytes]:
            with open(f"/proc/{program.pid}/mem", "rb", buffering=0) as memory:
                memory.seek(start)
                whole = memory.read(n_bytes)
            return [whole[at : at + 4096] for at in range(0, n_bytes, 4096)]

        before = content()
        for step in TRACKER_CASES[case] * 3:
            assert program.ask(f"step {step}") == "stepped"
            after = content()
            different = {start + 4096 * i for i, page in enumerate(after) if page != before[i]}
            pages = changed(program)
            assert set(pages["written"]) <= different
            assert different <= set(pages["written"]) | set(pages["gone"])
            before = after
