"""A writer that does everything at once survives dumps, a kill and restores, under each tracker."""

import pytest

from ckpt import probe_features
from integration.trackers.cases import offered
from integration.trackers.writer import run_writer, table

ARGUMENTS = ["--mib", "64", "--threads", "4", "--rate", "20000", "--ops", "all"]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", offered(probe_features()))
def test_the_writer_survives_twenty_dumps_and_a_restore_of_each_of_five(tracker, tmp_path):
    print(table(run_writer(tracker, tmp_path, ARGUMENTS, n_deltas=20, n_restores=5)))
