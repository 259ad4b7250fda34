"""A fork that does one thing for us, as far as that needs no privilege."""

import os

import pytest

from ckpt.process.stand_in import Identity, act
from ckpt.process.tree import list_children
from ckpt.units import Pid


def test_what_it_opens_stays_open_here():
    reader, writer = os.pipe()
    free = os.dup(reader)
    os.close(free)
    act(lambda: os.dup2(writer, free))
    os.close(writer)
    os.write(free, b"by the same pipe")
    assert os.read(reader, 100) == b"by the same pipe"
    os.close(free)
    os.close(reader)


def test_it_is_another_process_in_another_directory(tmp_path):
    seen = tmp_path / "seen"

    def note():
        seen.write_text(f"{os.getppid()} {os.getcwd()}")

    act(note, cwd=str(tmp_path))
    assert seen.read_text() == f"{os.getpid()} {tmp_path}"
    assert os.getcwd() != str(tmp_path)


def test_its_errors_are_ours(tmp_path):
    with pytest.raises(FileNotFoundError):
        act(lambda: os.unlink(tmp_path / "nothing"))
    with pytest.raises(OSError, match="a forked process of ours failed"):
        act(lambda: int("no number"))


def test_nobody_is_left_behind():
    before = list_children(Pid(os.getpid()))
    act(os.getpid)
    assert list_children(Pid(os.getpid())) == before


@pytest.mark.parametrize("numbers", [(-1, 0, 0), (2**31, 0, 0), (1, -1, 0), (1, 0, 2**32)])
def test_impossible_identities_are_refused(numbers):
    with pytest.raises(ValueError, match="no process can be"):
        Identity(*numbers)
