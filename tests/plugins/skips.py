"""No skip hides a missing thing: where it matters, a skip that is not listed is a failure.

Both tiers register this from their `conftest.py`. It is strict under CI (`CI=true` or `CKPT_CI=1`)
and wherever `CKPT_STRICT_SKIPS=1`; elsewhere skips are left alone. The list is
`tests/allowed.toml`.
"""

import os
from collections.abc import Generator

import pytest

from tests.plugins.allowed import AllowedSkip, read_allowed

PLUGIN_NAME = "ckpt-skips"
OFF = frozenset({"", "0", "false", "no"})


def register(config: pytest.Config) -> None:
    """Switch the policy on, once, if this run is a strict one."""
    if is_strict(os.environ) and not config.pluginmanager.has_plugin(PLUGIN_NAME):
        config.pluginmanager.register(StrictSkips(read_allowed().skip), PLUGIN_NAME)


def is_strict(environ: "os._Environ[str] | dict[str, str]") -> bool:
    names = ("CI", "CKPT_CI", "CKPT_STRICT_SKIPS")
    return any(environ.get(name, "").lower() not in OFF for name in names)


class StrictSkips:
    """Turns each unlisted skip into a failure of that test, or of that module's collection."""

    def __init__(self, allowed: tuple[AllowedSkip, ...]) -> None:
        self.allowed = allowed

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        # An expected failure is reported as skipped too; it did run.
        if not hasattr(report, "wasxfail"):
            self._judge(report)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self,
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        self._judge(report)
        return report

    def _judge(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.outcome != "skipped":
            return
        message = skip_message(report)
        if any(entry.covers(report.nodeid, message) for entry in self.allowed):
            return
        report.outcome = "failed"
        report.longrepr = f"skipped ({message}), and tests/allowed.toml does not list it"


def skip_message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the reason that the test itself gave."""
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")
