"""A hundred dumps of a redis under load leave nothing behind (`make soak` takes 10,000)."""

import pytest

from integration.soak.soak import BY_COMMAND, soak

N_DUMPS = 100


@pytest.mark.slow
def test_nothing_piles_up_while_a_busy_redis_is_dumped(tmp_path, record_property):
    outcome = soak(tmp_path, N_DUMPS)
    record_property("soak", outcome.report())
    assert outcome.troubles() == []
    assert (outcome.n_dumps, outcome.n_by_command) == (N_DUMPS, N_DUMPS // BY_COMMAND)
    names = {grown.name for grown in outcome.held}
    assert {"redis: fds", "ckpt: fds", "ckpt: KiB", "chain: generations"} <= names
    assert outcome.n_requests > 10 * N_DUMPS
