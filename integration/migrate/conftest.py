"""Hosts are made by the programs of iproute2 and util-linux."""

import shutil

import pytest

NEEDED = ("ip", "tc", "nft", "nsenter", "unshare", "setpriv", "setsid")


def pytest_collection_modifyitems(items):
    missing = [name for name in NEEDED if not shutil.which(name)]
    if not missing:
        return
    for item in items:
        if item.nodeid.startswith("integration/migrate/"):
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))
