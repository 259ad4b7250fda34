"""What a dump and a restore tell of themselves: logs on stderr, figures for Prometheus."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from integration.harness import Restored, become_subreaper, ckpt
from integration.trees.test_trees import Tree, python

become_subreaper()


def read(path):
    families = text_string_to_metric_families(path.read_text())
    return {one.name: one.value for family in families for one in family.samples}


@pytest.mark.parametrize("kill", [[], ["--kill"]], ids=["goes on", "killed"])
def test_a_dump_tells_its_steps_and_figures(tmp_path, kill):
    image, path = tmp_path / "image", tmp_path / "job.prom"
    with Tree(python(""), cwd=tmp_path) as work:
        line = ["dump", "--pid", str(work.pid), *kill, "--json", "--log-json", "--metrics", path]
        done = ckpt(*line, image)
        assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    steps = ["looking", "deciding", "copying while it runs", "freezing and taking", "committing"]
    assert [one["step"] for one in told] == steps
    assert all(one["command"] == "dump" and one["ms"] >= 0 for one in told)
    assert sum(one["ms"] for one in told) >= said["freeze_ms"]
    found = read(path)
    assert found["ckpt_success"] == 1
    assert found["ckpt_freeze_seconds"] == pytest.approx(said["freeze_ms"] / 1000, abs=1e-5)
    assert found["ckpt_bytes"] == said["bytes"]
    assert (found["ckpt_pages"], found["ckpt_generation"]) == (said["pages"]["data"], 0)


def test_a_restore_tells_them_too(tmp_path):
    image, path = tmp_path / "image", tmp_path / "job.prom"
    with Tree(python(""), cwd=tmp_path) as work:
        assert ckpt("dump", "--pid", str(work.pid), "--kill", image).returncode == 0
    with Restored(image, "--log-level", "info", "--metrics", str(path)) as back:
        # It is told when the process runs, and not when it has ended.
        found = read(path)
        assert found["ckpt_success"] == 1
        assert found["ckpt_wall_seconds"] == pytest.approx(back.said["restore_ms"] / 1000, abs=1e-5)
        assert back.ask("6 * 7") == "42"
        back.process.kill()
        told = back.process.stderr.read().decode().splitlines()
    assert [line.split(" took ")[0].split("info ")[1] for line in told if " info " in line] == [
        "restore: verifying",
        "restore: building",
        "restore: finishing",
    ]


def test_a_failure_is_a_figure_as_well(tmp_path):
    path = tmp_path / "job.prom"
    done = ckpt("dump", "--pid", "4194304", "--log-json", "--metrics", path, tmp_path / "image")
    assert done.returncode != 0
    assert json.loads(done.stderr)["level"] == "error"
    assert read(path)["ckpt_success"] == 0
