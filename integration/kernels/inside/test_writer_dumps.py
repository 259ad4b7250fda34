"""A self-checking writer, dumped while it runs, killed and restored, by each tracker there is."""

import pytest

from ckpt import probe_features
from integration.trackers.cases import offered
from integration.trackers.writer import run_writer, table

# As on the machine's own kernel, but for a processor that is ten times slower.
ARGUMENTS = ["--mib", "16", "--threads", "4", "--rate", "2000"]


@pytest.mark.parametrize("tracker", offered(probe_features()))
def test_the_writer_survives_dumps_a_kill_and_a_restore(tracker, tmp_path):
    print(table(run_writer(tracker, tmp_path, ARGUMENTS, n_deltas=4, n_restores=1)))
