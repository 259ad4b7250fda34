"""What this kernel offers, asked once."""

import pytest

from ckpt.kernel.features import probe_features


@pytest.fixture(scope="session")
def features():
    return probe_features()


@pytest.fixture
def needs_pagemap_scan(features):
    if not features.pagemap_scan:
        pytest.skip("this kernel has no PAGEMAP_SCAN")


@pytest.fixture
def needs_wp_async(features):
    if not features.uffd_wp_async:
        pytest.skip("this kernel has no asynchronous write-protection")
