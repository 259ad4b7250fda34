"""A self-checking writer, dumped while it runs, killed and restored, by each tracker there is."""

import pytest

from ckpt import probe_features
from integration.trackers.cases import offered
from integration.trackers.warm import AS_MANY_ROUNDS_AS_HELP
from integration.trackers.writer import run_writer, table

# As on the machine's own kernel, but for a processor that is ten times slower.
ARGUMENTS = ["--mib", "16", "--threads", "4", "--rate", "2000"]


@pytest.mark.parametrize("tracker", offered(probe_features()))
def test_the_writer_survives_dumps_a_kill_and_a_restore(tracker, tmp_path):
    print(table(run_writer(tracker, tmp_path, ARGUMENTS, n_deltas=4, n_restores=1)))


def test_the_writer_survives_rounds_with_a_stop_for_each_scan(tmp_path):
    made = run_writer(
        "softdirty",
        tmp_path,
        ARGUMENTS,
        n_deltas=3,
        n_restores=1,
        max_freeze_ms=AS_MANY_ROUNDS_AS_HELP,
    )
    print(table(made))
    assert any(dump.rounds for dump in made)
