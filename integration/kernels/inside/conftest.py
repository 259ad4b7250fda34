"""What the tests inside know: which kernel this is, and a process whose pages they command."""

import os
import platform

import attrs
import pytest

from integration.kernels.inside.pages_process import PagesProcess
from integration.kernels.inside_run import ENV_OFFERS, ENV_RELEASE

if ENV_RELEASE not in os.environ:
    raise pytest.UsageError("these tests run inside a virtual machine: make kernels")


@attrs.frozen
class KernelUnderTest:
    """The kernel that was booted, and what it is known to offer."""

    release: str
    series: tuple[int, int]
    """Major and minor number: (6, 12)."""
    offers: frozenset[str]
    """Of `soft_dirty`, `pagemap_scan`, `uffd_wp_async`. To be compared with what is probed."""


@pytest.fixture(scope="session")
def kernel_under_test():
    release = platform.release()
    major, minor = release.split(".")[:2]
    return KernelUnderTest(
        release, (int(major), int(minor)), frozenset(os.environ[ENV_OFFERS].split())
    )


@pytest.fixture(scope="module")
def process():
    with PagesProcess.start() as process:
        yield process
