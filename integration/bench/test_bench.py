"""The bench measures what it says: a goal is judged by the median, a ratio round by round."""

import functools
import json

import pytest

from integration.bench.cycle import Case, measure
from integration.bench.report import Collector, Goal, Of
from integration.bench.scaling import Axis, measure_axis
from integration.bench.target import Gone, start_target
from integration.bench.tools import Bench, Ckpt, ToolFailed
from integration.harness import become_subreaper

become_subreaper()


class Broken:
    """A tool that never does what it shall."""

    name = "criu"

    def dump(self, *_: object, **__: object):
        raise ToolFailed("no\nreason at all")


def collect(ckpt, criu, goals=()):
    into = Collector()
    for name, values in (("ckpt", ckpt), ("criu", criu)):
        for value in values:
            into.add("case", "freeze", "ms", name, value)
    return into.section("title", {("case", "freeze"): goals})


@pytest.fixture
def bench(tmp_path):
    for name in ("work", "tmpfs", "disk"):
        (tmp_path / name).mkdir()
    return Bench((Ckpt(),), tmp_path / "work", tmp_path / "tmpfs", tmp_path / "disk", 1)


def test_a_ratio_is_of_the_same_round():
    (row,) = collect([1, 20, 3], [2, 10, 30]).rows
    assert row.ratios() == [0.5, 2, 0.1]


def test_the_median_decides():
    goals = (Goal(3), Goal(2.9), Goal(0.5, Of.RATIO), Goal(0.6, Of.RATIO, at_least=True))
    (row,) = collect([1, 20, 3], [2, 10, 30], goals).rows
    assert [row.verdict(goal) for goal in goals] == ["met", "missed", "met", "missed"]


def test_without_the_other_there_is_no_ratio_and_no_verdict_on_it():
    goal = Goal(0.5, Of.RATIO)
    (row,) = collect([1], [], (goal,)).rows
    assert (row.ratios(), row.verdict(goal)) == ([], "")


def test_a_section_is_plain_json():
    plain = json.loads(json.dumps(collect([1, 3], [2, 2], (Goal(2),)).plain()))
    (row,) = plain["rows"]
    assert row["by"]["ckpt"] == {"min": 1, "median": 2, "max": 3, "values": [1, 3]}
    assert row["ratio"]["median"] == 1
    assert row["goals"] == {"≤ 2 ms": "met"}


def test_a_process_is_dumped_and_comes_back_and_is_checked(bench):
    into = Collector()
    start = functools.partial(start_target, mib=4, fill="half", rate=1000)
    measure(bench, Case("small", start), into)
    found = {row.measure: row.by["ckpt"] for row in into.section("", {}).rows}
    assert {len(values) for values in found.values()} == {1}
    assert found["freeze"][0] <= found["wall"][0]
    assert 1 < found["image"][0] < 4.2
    assert found["restore"][0] > 0


def test_a_tool_that_fails_is_named_and_the_other_goes_on(bench, capsys):
    both = Bench((Broken(), *bench.tools), bench.work, bench.tmpfs, bench.disk, 2)
    into = Collector()
    measure(both, Case("small", functools.partial(start_target, mib=1), restores=False), into)
    assert len(into.values("small", "freeze", "ckpt")) == 2
    assert into.notes[0] == "small: criu failed: reason at all"
    assert "no\nreason at all" in capsys.readouterr().err


def test_a_line_is_laid_through_the_sizes(bench):
    found = measure_axis(bench, Axis("fds", "open files", "file", (1, 50)))
    described = found["measures"]["freeze"]["ckpt"]
    assert [point["n"] for point in described["points"]] == [1, 50]
    line = described["line"]
    last = described["points"][-1]["median"]
    assert line["ms_at_0"] + 50 * line["ms_each"] == pytest.approx(last)


def test_a_process_that_ended_is_gone(tmp_path):
    with start_target(tmp_path, mib=1) as process:
        assert process.board.read("n_pages") == 256
        process.board.check()
    with pytest.raises(Gone):
        process.board.read("n_pages")


def test_damage_is_noticed(tmp_path):
    with start_target(tmp_path, mib=1) as process:
        with open(f"/proc/{process.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(process.board.read("area") + 17 * 4096)
            memory.write(b"\xff" * 8)
        with pytest.raises(RuntimeError, match="1 pages"):
            process.board.check()


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        (Goal(10), "≤ 10 ms"),
        (Goal(0.5, Of.RATIO), "≤ 0.5 x"),
        (Goal(1 / 40, Of.RATIO), "≤ 1/40 x"),
        (Goal(0.95, Of.RATIO, at_least=True), "≥ 0.95 x"),
    ],
)
def test_a_goal_says_what_it_asks_for(goal, text):
    assert goal.text("ms") == text
