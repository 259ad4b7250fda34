"""Counts how often each promise was put to the test, and how often it was not kept.

    def test_it(promise):
        kept = promise("a target whose tracer is killed goes on")
        for ... in ...:
            kept.try_once()
            assert ...

The end of a run tells `N tried, M lost` for each. A test stops at the first one that is lost.
"""

import attrs
import pytest

PLUGIN_NAME = "ckpt-promises"


@attrs.define
class Promise:
    """One promise, over all tests of it."""

    text: str
    n_tried: int = 0
    n_lost: int = 0

    def try_once(self) -> None:
        """Count one more attempt, before it is made."""
        self.n_tried += 1

    def __str__(self) -> str:
        return f"{self.text}: {self.n_tried} tried, {self.n_lost} lost"


class Promises:
    """All that were made in this run."""

    def __init__(self):
        self._known = {}
        self._of_tests = {}

    @pytest.fixture
    def promise(self, request):
        """Return how a test says which promise it is about."""

        def of(text):
            made = self._known.setdefault(text, Promise(text))
            self._of_tests.setdefault(request.node.nodeid, []).append(made)
            return made

        return of

    def pytest_runtest_logreport(self, report):
        if report.when != "setup":
            for promise in self._of_tests.get(report.nodeid, ()):
                promise.n_lost += report.failed

    def pytest_terminal_summary(self, terminalreporter):
        if self._known:
            terminalreporter.section("promises")
            for promise in self._known.values():
                terminalreporter.write_line(str(promise))


def register(config):
    """Have the fixture and the summary in this run, once."""
    if not config.pluginmanager.has_plugin(PLUGIN_NAME):
        config.pluginmanager.register(Promises(), PLUGIN_NAME)
