"""A tree moves from one host to the other while it runs, with its connections, and back."""

import pytest

from integration.migrate.hosts import two_hosts
from integration.migrate.moving import live
from integration.migrate.test_offline import CHECKS


@pytest.fixture
def hosts():
    with two_hosts() as made:
        yield made


NAMED_SOCKETS = {"postgres", "unix sockets"}
"""Both hosts have one file system here, and there the names are still the source's."""


@pytest.mark.parametrize("name", sorted(CHECKS.keys() - NAMED_SOCKETS))
def test_a_service_moves_there_and_back(name, hosts, tmp_path):
    check, options = CHECKS[name]
    figures = check(hosts, live(hosts, tmp_path), tmp_path, **options, moves=2)
    print(name, figures)
    assert hosts.a.tables() == hosts.b.tables() == []
