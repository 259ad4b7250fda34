"""Each kernel is prepared and booted once a session; what that took is told at the end."""

import os

import pytest

from integration.kernels.images import WISHES, KernelCache, default_cache, ensure_host_tools
from integration.kernels.inside_run import ENV_RELEASE, Timing, prepare, run_inside

# Those are collected by the pytest that runs inside a machine, and by no other.
collect_ignore = [] if ENV_RELEASE in os.environ else ["inside"]

TIMINGS = pytest.StashKey[list[Timing]]()
CONFIGS = pytest.StashKey[list[str]]()


def pytest_configure(config):
    config.stash[TIMINGS] = []
    config.stash[CONFIGS] = []


def pytest_terminal_summary(terminalreporter, config):
    lines = [str(timing) for timing in config.stash[TIMINGS]] + config.stash[CONFIGS]
    if lines:
        terminalreporter.section("kernels")
    for line in lines:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def host_tools():
    ensure_host_tools()


@pytest.fixture(scope="session", params=WISHES, ids=lambda wish: wish.series)
def timing(request):
    timing = Timing(request.param.series)
    request.config.stash[TIMINGS].append(timing)
    return timing


@pytest.fixture(scope="session")
def machine(request, timing):
    request.getfixturevalue("host_tools")
    (wish,) = [wish for wish in WISHES if wish.series == timing.series]
    return prepare(wish, KernelCache(default_cache()), timing)


@pytest.fixture(scope="session")
def inside_run(machine, timing, tmp_path_factory):
    return run_inside(machine, tmp_path_factory.mktemp(f"linux-{timing.series}-"), timing)


@pytest.fixture
def tell_config(request):
    """Add a line to the summary."""
    return request.config.stash[CONFIGS].append
