"""The promise: what is said at the end of a run to be tried and lost was."""

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture
def counting(pytester):
    pytester.makeconftest("from tests.plugins.promises import register as pytest_configure")
    return pytester


def test_what_was_tried_and_lost_is_told_for_each_promise(counting):
    counting.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("good", [True, True, False])
        def test_it(promise, good):
            kept = promise("it goes on")
            for number in range(3):
                kept.try_once()
                assert good or number < 1

        def test_other(promise):
            promise("it is whole").try_once()
        """
    )
    result = counting.runpytest()
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        ["it goes on: 8 tried, 1 lost", "it is whole: 1 tried, 0 lost"], consecutive=True
    )


def test_nothing_is_said_where_nothing_was_promised(counting):
    counting.makepyfile("def test_it(): pass")
    counting.runpytest().stdout.no_fnmatch_line("*promises*")
