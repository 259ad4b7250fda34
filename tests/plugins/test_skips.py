"""The promise: a test that is skipped in CI is listed with its reason, or the run fails."""

import pytest

from tests.plugins.allowed import AllowedSkip, read_allowed
from tests.plugins.skips import is_strict

pytest_plugins = ["pytester"]

CONFTEST = """
from tests.plugins.allowed import AllowedSkip
from tests.plugins.skips import StrictSkips

def pytest_configure(config):
    listed = AllowedSkip(test="*::test_listed[a]", message="no soft-dirty*", because="of it")
    config.pluginmanager.register(StrictSkips((listed,)))
"""


@pytest.fixture
def strict(pytester):
    pytester.makeconftest(CONFTEST)
    return pytester


def test_an_unlisted_skip_fails_and_tells_why(strict):
    strict.makepyfile("import pytest\ndef test_it(): pytest.skip('no qemu here')")
    result = strict.runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*skipped (no qemu here)*tests/allowed.toml*"])


def test_an_unlisted_mark_fails(strict):
    strict.makepyfile("import pytest\n@pytest.mark.skipif(True, reason='x')\ndef test_it(): pass")
    strict.runpytest().assert_outcomes(errors=1)


def test_a_module_that_skips_itself_fails_the_run(strict):
    strict.makepyfile("import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass")
    result = strict.runpytest()
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*skipped (*no_such_module*"])


def test_a_listed_skip_passes(strict):
    strict.makepyfile(
        """
        import pytest
        @pytest.mark.parametrize("which", ["a"])
        def test_listed(which): pytest.skip("no soft-dirty bits in this kernel")
        """
    )
    result = strict.runpytest()
    result.assert_outcomes(skipped=1)
    assert result.ret == 0


def test_a_listed_test_that_skips_for_another_reason_fails(strict):
    strict.makepyfile(
        """
        import pytest
        @pytest.mark.parametrize("which", ["a"])
        def test_listed(which): pytest.skip("redis-server is missing")
        """
    )
    strict.runpytest().assert_outcomes(failed=1)


def test_an_expected_failure_is_not_a_skip(strict):
    strict.makepyfile("import pytest\n@pytest.mark.xfail\ndef test_it(): assert False")
    strict.runpytest().assert_outcomes(xfailed=1)


@pytest.mark.parametrize(
    ("environ", "strict"),
    [
        ({}, False),
        ({"CI": "true"}, True),
        ({"CI": "false"}, False),
        ({"CKPT_CI": "1"}, True),
        ({"CKPT_STRICT_SKIPS": "1"}, True),
        ({"CKPT_STRICT_SKIPS": "0"}, False),
    ],
)
def test_strict_where_it_matters(environ, strict):
    assert is_strict(environ) is strict


def test_both_tiers_are_strict_in_ci(pytester, monkeypatch, request):
    monkeypatch.setenv("CKPT_STRICT_SKIPS", "1")
    top = request.config.rootpath
    for tier in ("tests", "integration"):
        pytester.makepyfile(f"import pytest\ndef test_it(): pytest.skip('{tier}')")
        pytester.makeconftest((top / tier / "conftest.py").read_text())
        pytester.runpytest().assert_outcomes(failed=1)


def test_the_list_is_well_formed():
    assert read_allowed()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[[skip]]\ntest = '*'\nmessage = '*'\nbecause = ' '", ValueError),
        ("[[skip]]\ntest = '*'\nbecause = 'some reason'", TypeError),
        ("[[skips]]\ntest = '*'", ValueError),
    ],
)
def test_an_entry_without_a_reason_is_refused(tmp_path, text, error):
    (tmp_path / "allowed.toml").write_text(text)
    with pytest.raises(error):
        read_allowed(tmp_path / "allowed.toml")


def test_a_bracket_in_a_pattern_is_itself():
    entry = AllowedSkip(test="t.py::test_x[softdirty-*]", message="*", because="r")
    assert entry.covers("t.py::test_x[softdirty-1]", "m")
    assert not entry.covers("t.py::test_xs", "m")
