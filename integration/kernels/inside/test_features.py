"""What ckpt finds out about this kernel by itself is what the kernel is known to offer."""

import platform

import pytest

from ckpt.kernel.features import probe_features


@pytest.fixture(scope="module")
def features():
    return probe_features()


@pytest.mark.parametrize("feature", ["soft_dirty", "pagemap_scan", "uffd_wp_async"])
def test_the_probe_finds_what_this_kernel_offers_and_no_more(features, kernel_under_test, feature):
    assert getattr(features, feature) == (feature in kernel_under_test.offers)


def test_pagemap_scan_knows_soft_dirty_where_there_is_such_a_call(features):
    assert features.pagemap_scan_soft_dirty == features.pagemap_scan


def test_the_probe_names_this_kernel(features):
    assert features.kernel_release == platform.release()


def test_what_a_restore_needs_is_found(features):
    assert features.set_tid
    assert features.timens
    assert features.kcmp
    assert features.pidfd_getfd
    assert features.rseq
    assert features.posix_timers_listed
    assert {"sys_admin", "sys_ptrace", "sys_resource"} <= features.capabilities
