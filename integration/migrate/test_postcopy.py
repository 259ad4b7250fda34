"""A tree runs at the destination before its memory has come, and never sees anything but that."""

import pytest

from integration.migrate.hosts import two_hosts
from integration.migrate.moving import live
from integration.migrate.services import redis, writer


@pytest.fixture
def hosts():
    with two_hosts() as made:
        yield made


def test_a_writer_finds_every_byte_while_they_come(hosts, tmp_path):
    writer.check(hosts, live(hosts, tmp_path, "--lazy"), tmp_path, rate=10_000, moves=2)


def test_redis_keeps_its_connections_and_its_data(hosts, tmp_path):
    figures = redis.check(hosts, live(hosts, tmp_path, "--lazy"), tmp_path, mib=64, moves=2)
    assert figures["verified"]["lost"] == 0
    assert hosts.a.tables() == hosts.b.tables() == []
