"""What the tests of commands share."""

import pytest

from ckpt.cli.main import cli, run


@pytest.fixture
def ckpt(capsys):
    """Run a command in this process; return its exit code, and what it wrote."""

    def call(*args):
        code = run(cli, list(map(str, args)))
        out, err = capsys.readouterr()
        return code, out, err

    return call
