"""The promise: what a killed command has left of its own goes with the next, and nothing else."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt.cli import scratch
from ckpt.cli.scratch import PREFIX, private_directory, remove_leftovers
from ckpt.errors import ImageUnusable

HOLD = """
import os, sys
from ckpt.cli.scratch import private_directory
with private_directory() as path:
    os.makedirs(f"{path}/image/gen-000000")
    open(f"{path}/image/gen-000000/pages-0", "w").close()
    os.symlink("/", f"{path}/link")
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def holding():
    """Another process that uses one, until its input ends; yields it and the directory."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process, Path(process.stdout.readline().rstrip("\n"))
    assert process.returncode in (0, -signal.SIGKILL)


def test_it_is_empty_private_and_gone_at_the_end(folder):
    with private_directory() as path:
        assert (os.listdir(path), os.stat(path).st_mode & 0o777) == ([], 0o700)
        (Path(path) / "file").write_text("")
        assert os.listdir(folder) == [os.path.basename(path)]
    assert os.listdir(folder) == []


def test_what_a_killed_one_left_goes_and_what_is_in_use_stays(folder):
    with holding() as (killed, left), holding() as (_, used):
        killed.kill()
        killed.wait()
        assert left.exists()
        with private_directory() as path:
            assert sorted(folder.iterdir()) == sorted([used, Path(path)])
        assert (used / "image" / "gen-000000" / "pages-0").exists()
    assert os.listdir(folder) == []


def make_link(path, precious):
    path.symlink_to(precious)


def make_readable(path, precious):
    shutil.copytree(precious, path)
    path.chmod(0o755)


def make_file(path, precious):
    shutil.copyfile(precious / "file", path)


@pytest.mark.parametrize("make", [make_link, make_readable, make_file])
def test_what_is_not_ours_stays(folder, make):
    precious = folder / "precious"
    precious.mkdir(0o700)
    (precious / "file").write_text("precious")
    make(folder / f"{PREFIX}0", precious)
    with private_directory():
        pass
    assert sorted(os.listdir(folder)) == [f"{PREFIX}0", "precious"]
    assert os.listdir(precious) == ["file"]
    if (folder / f"{PREFIX}0").is_dir():
        assert os.listdir(folder / f"{PREFIX}0") == ["file"]


def test_one_that_was_taken_for_left_before_it_was_locked_is_made_again(folder, monkeypatch):
    """Another command may look between any two of the steps in which one is made."""
    made = []

    def found(path):
        made.append(path)
        if len(made) == 1:
            remove_leftovers(folder)
        fd = opened(path)
        if len(made) == 2:
            remove_leftovers(folder)
        return fd

    opened = scratch._open
    monkeypatch.setattr(scratch, "_open", found)
    with private_directory() as path:
        assert [os.path.exists(one) for one in made] == [False, False, True]
        assert path == made[2]


def test_a_standard_stream_that_is_closed_stays_so(folder):
    """A number that somebody reads from or writes to must not be that of a directory."""
    code = HOLD.replace("sys.stdin.read()", "print(os.path.exists('/proc/self/fd/0'), flush=True)")
    line = ["sh", "-c", 'exec "$@" 0<&-', "sh", sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == ["False"]
    assert os.listdir(folder) == []


def test_there_must_be_a_place(folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(folder / "none"))
    with (
        pytest.raises(ImageUnusable, match="nothing can be fetched to there"),
        private_directory(),
    ):
        pass
