"""For tests without privilege and without waiting."""

import hypothesis

from tests.plugins import skips

# A slow machine is no failure; the time limit of a test is pytest-timeout's.
hypothesis.settings.register_profile("ckpt", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ckpt")


def pytest_configure(config):
    skips.register(config)
