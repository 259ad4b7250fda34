"""The file of `--metrics` is one that Prometheus reads, whole, and remembers the last success."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ckpt.cli.main import cli, run
from ckpt.cli.metrics import FIGURES, Metrics
from ckpt.errors import UsageError
from tests.plugins.tree import TOP

LABELS = {"command": "dump", "image_dir": 'a "b"\\\n\udcff'}


def read(path):
    families = text_string_to_metric_families(path.read_text())
    return {one.name: (one.value, one.labels) for family in families for one in family.samples}


def test_all_figures_of_a_run(tmp_path):
    path = tmp_path / "job.prom"
    with Metrics(str(path)).of(**LABELS) as figures:
        figures |= dict.fromkeys(FIGURES, 7.5)
    found = read(path)
    assert {f"ckpt_{name}" for name in FIGURES} < set(found)
    assert {labels["image_dir"] for _, labels in found.values()} == {'a "b"\\\n\\xff'}
    assert found["ckpt_bytes"][0] == 7.5
    assert found["ckpt_success"][0] == 1
    assert found["ckpt_last_success_timestamp_seconds"] == found["ckpt_timestamp_seconds"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_does_not_forget_the_last_success(tmp_path):
    path = tmp_path / "job.prom"
    with Metrics(str(path)).of(**LABELS) as figures:
        figures["generation"] = 3
    before = read(path)
    with pytest.raises(UsageError), Metrics(str(path)).of(**LABELS):
        raise UsageError("no")
    after = read(path)
    assert after["ckpt_success"][0] == 0
    assert after["ckpt_timestamp_seconds"] > before["ckpt_timestamp_seconds"]
    last = "ckpt_last_success_timestamp_seconds"
    assert after[last] == before[last]
    assert "ckpt_generation" not in after


@pytest.mark.parametrize("old", ["", "no metrics {{{", "ckpt_success 1\n", None])
def test_whatever_was_there_before_is_replaced(tmp_path, old):
    path = tmp_path / "job.prom"
    if old is not None:
        path.write_text(old)
    with pytest.raises(UsageError), Metrics(str(path)).of(command="restore"):
        raise UsageError("no")
    assert set(read(path)) == {"ckpt_success", "ckpt_timestamp_seconds"}


def test_metrics_that_cannot_be_written_are_told_and_change_nothing(tmp_path, capsys):
    with Metrics(str(tmp_path / "none" / "job.prom")).of(command="dump"):
        pass
    assert capsys.readouterr().err.startswith("ckpt: cannot write the metrics to ")


@pytest.mark.parametrize("command", [["dump", "--pid", "1"], ["restore"]])
def test_a_place_that_cannot_be_is_refused_before_anything_is_done(command, tmp_path, capsys):
    line = [*command, str(TOP / "images" / "golden" / "format-1.0"), "--metrics"]
    assert run(cli, [*line, str(tmp_path / "none" / "job.prom")]) == 2
    assert "--metrics: there is no directory" in capsys.readouterr().err
