"""The manual page is made of the commands as they are, and is one that man(1) can show."""

import re
import subprocess
import sys

import click
import pytest

from ckpt.cli.main import COMMANDS, cli
from ckpt.errors import ChainBroken, TargetGone


def run(*words, given=None):
    done = subprocess.run(words, input=given, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def source():
    return run(sys.executable, "-m", "ckpt.cli.manual")


@pytest.fixture(scope="module")
def shown(source):
    """The page as a terminal shows it, in one line."""
    text = run("groff", "-man", "-Tascii", "-P-cbou", "-rLL=300n", "-rHY=0", given=source)
    return re.sub(r"\s+", " ", text)


def test_its_language_is_right(source):
    assert run("groff", "-man", "-ww", "-z", given=source) == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_with_its_options_and_examples(name, shown):
    with click.Context(cli, info_name="ckpt") as ctx:
        command = cli.get_command(ctx, name)
    parts = re.split(r" ckpt ([\w-]+) \[OPTIONS\]| (COMMON) OPTIONS ", shown)
    section = parts[parts.index(name) + 2]
    common = parts[parts.index("COMMON") + 1]
    for param in command.params:
        if isinstance(param, click.Option):
            is_common = param.name in ("as_json", "log_level", "log_json")
            assert param.opts[0] in (common if is_common else section), param.opts
    for line in command.epilog.removeprefix("\b\n").splitlines():
        assert re.sub(r"\s+", " ", line.strip()) in section, line


def test_exit_codes_are_explained(shown):
    codes = shown.partition("EXIT STATUS")[2]
    for error in (ChainBroken, TargetGone):
        words = " ".join(error.__doc__.split("\n\n")[0].split())
        assert f"{error.exit_code} {words}" in codes
