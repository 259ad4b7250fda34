"""For tests with real processes: they need root, and say so instead of failing one by one."""

import os
import signal
from pathlib import Path

import pytest

from tests.plugins import promises, skips

# A shell starts what runs in the background with this ignored, which children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Each command that a test starts would compile all of ckpt again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

HERE = Path(__file__).parent


def pytest_configure(config):
    skips.register(config)
    promises.register(config)


def pytest_collection_modifyitems(items):
    if os.geteuid() == 0:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs root: it stops and restores processes"))
