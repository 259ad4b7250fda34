"""The promise: a file that was opened long ago tells what is true when it is read."""

import contextlib
import os
import subprocess
import sys

import pytest

from ckpt.kernel.procfs import held as module
from ckpt.kernel.procfs.files import read_bytes
from ckpt.kernel.procfs.held import Descriptors, HeldFiles
from ckpt.units import Pid

ME = Pid(os.getpid())


@pytest.fixture
def open_files():
    """Return what opens some, which are closed at the end."""
    with contextlib.ExitStack() as stack:

        def opened(pid, names):
            held = HeldFiles(pid, names)
            stack.callback(held.close)
            return held

        yield opened


def test_what_is_read_is_what_is_there_now(open_files):
    held = open_files(ME, ["comm", "task/1/status", "coredump_filter"])
    before = held.read()
    assert before.keys() == {"comm", "coredump_filter"}
    with open("/proc/self/comm", "r+") as file:
        name = file.read()
        try:
            file.write("another")
            file.flush()
            assert held.read()["comm"] == read_bytes(ME, "comm") == b"another\n" != before["comm"]
        finally:
            file.write(name.removesuffix("\n"))
    assert held.read()["coredump_filter"] == read_bytes(ME, "coredump_filter")


def test_sizes_tell_that_there_is_nothing(open_files):
    name = f"task/{ME}/children"
    held = open_files(ME, [name])
    before = held.read_sizes()[name]
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    try:
        assert held.read_sizes()[name] > before
    finally:
        child.communicate()
    assert held.read_sizes()[name] == before


def test_a_process_that_has_ended_is_left_out(open_files):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    held = open_files(Pid(child.pid), ["status", "stat"])
    assert held.read().keys() == {"status", "stat"}
    child.communicate(b"\n")
    assert held.read() == {}


def test_what_is_too_long_is_left_out(open_files, monkeypatch):
    size = len(read_bytes(ME, "limits"))
    monkeypatch.setattr(module, "_ROOM_BYTES", size)
    assert open_files(ME, ["limits"]).read() == {}
    monkeypatch.setattr(module, "_ROOM_BYTES", size + 1)
    assert open_files(ME, ["limits"]).read() == {"limits": read_bytes(ME, "limits")}


def test_none_is_held_where_so_many_are_not_allowed(open_files, monkeypatch):
    monkeypatch.setattr(Descriptors, "make_room", lambda _self, _n: False)
    assert open_files(ME, ["comm"]).read() == {}


def test_they_are_closed(open_files):
    before = os.listdir("/proc/self/fd")
    held = open_files(ME, ["comm"] * 10)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 10
    held.close()
    assert os.listdir("/proc/self/fd") == before
