"""A writer that does everything at once survives dumps, a kill and restores, under each tracker."""

import pytest

from ckpt import probe_features
from ckpt.tracker.base import TELLING
from integration.trackers.cases import offered
from integration.trackers.warm import AS_MANY_ROUNDS_AS_HELP
from integration.trackers.writer import run_writer, table

ARGUMENTS = ["--mib", "24", "--threads", "4", "--rate", "8000", "--ops", "all"]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", offered(probe_features()))
def test_the_writer_survives_twenty_dumps_and_a_restore_of_each_of_five(tracker, tmp_path):
    print(table(run_writer(tracker, tmp_path, ARGUMENTS, n_deltas=20, n_restores=5)))


@pytest.mark.slow
@pytest.mark.parametrize("tracker", offered(probe_features()))
@pytest.mark.parametrize("rate", [8000, 0])
def test_the_writer_survives_rounds_and_twins(rate, tracker, tmp_path):
    """At full speed (rate 0) no round leaves less, so a twin is read while all of it changes."""
    arguments = [*ARGUMENTS, "--rate", str(rate)]
    made = run_writer(
        tracker,
        tmp_path,
        arguments,
        n_deltas=10,
        n_restores=4,
        max_freeze_ms=AS_MANY_ROUNDS_AS_HELP,
    )
    print(table(made))
    assert any(dump.rounds for dump in made) == (tracker in TELLING)
