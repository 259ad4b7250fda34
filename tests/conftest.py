"""For tests without privilege and without waiting."""

import os

import hypothesis

from tests.plugins import promises, skips

# A slow machine is no failure; the time limit of a test is pytest-timeout's.
# In CI the examples are always the same: red there means the change, not luck. Elsewhere they are
# new each time, and find what nobody thought of.
hypothesis.settings.register_profile(
    "ckpt", deadline=None, print_blob=True, derandomize="CKPT_CI" in os.environ
)
hypothesis.settings.load_profile("ckpt")


def pytest_configure(config):
    skips.register(config)
    promises.register(config)
