"""Hosts are made by the programs of iproute2 and util-linux."""

import shutil

import pytest

from integration.migrate.cutting import counted
from integration.migrate.hosts import two_hosts

NEEDED = ("ip", "tc", "nft", "nsenter", "unshare", "setpriv", "setsid")


def pytest_collection_modifyitems(items):
    missing = [name for name in NEEDED if not shutil.which(name)]
    if not missing:
        return
    for item in items:
        if item.nodeid.startswith("integration/migrate/"):
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))


@pytest.fixture
def hosts():
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def lasting_hosts():
    """For tests that leave nothing behind, and look for it."""
    with two_hosts() as made:
        made.part_memory_files()
        yield made


@pytest.fixture
def tree(lasting_hosts, tmp_path):
    """The workload that cannot run twice unnoticed, on host `a`."""
    with counted(lasting_hosts, tmp_path) as made:
        yield made
