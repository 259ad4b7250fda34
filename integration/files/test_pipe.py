"""Pipes inside a process: content, packets, size, ends; and those that lead out of it."""

import contextlib
import errno
import fcntl
import os

import pytest

from ckpt.errors import UnsupportedState
from ckpt.kernel import ptrace
from ckpt.process.freezer import freeze
from ckpt.resources.base import Stopped, Target
from ckpt.resources.files.table import FILES
from integration.files.processes import (
    FEATURES,
    brought_back,
    capture,
    look,
    opened_by,
    rebuilt,
)


def status_flags(record):
    return [description.flags for description in record.descriptions]


def contents(record):
    return [d.record.content for d in record.descriptions if d.kind == "pipe"]


def set_flags(fd, flags):
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | flags)


def test_content_comes_back_and_stays_in_the_original():
    def prepare():
        _, writer = os.pipe()
        os.write(writer, b"partly ")
        os.read(3, 3)
        os.write(writer, b"read" * 5000)

    with opened_by(prepare) as pid:
        record = capture(pid)
        assert contents(capture(pid)) == contents(record)
    with rebuilt(record, pid) as built:
        assert status_flags(built.capture()) == status_flags(record)
        assert built.read(3, 30000) == b"tly " + b"read" * 5000
        assert built.write(4, b"more") == 4
        assert built.read(3, 100) == b"more"


def test_an_empty_pipe_blocks_or_not_as_before():
    def prepare():
        reader, _ = os.pipe()
        os.set_blocking(reader, False)

    with brought_back(prepare) as (record, built):
        assert status_flags(built.capture()) == status_flags(record)
        with pytest.raises(BlockingIOError):
            built.read(3, 1)


@pytest.mark.parametrize("n_bytes", [4096, 1 << 20])
def test_a_full_pipe_of_a_chosen_size(n_bytes):
    def prepare():
        reader, writer = os.pipe2(os.O_NONBLOCK)
        assert fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, n_bytes) == n_bytes
        assert os.write(writer, b"x" * n_bytes) == n_bytes

    with brought_back(prepare) as (record, built):
        assert contents(record) == [(b"x" * n_bytes,), ()]
        assert contents(built.capture()) == contents(record)
        assert record.descriptions[1].record.capacity_bytes == n_bytes
        with pytest.raises(BlockingIOError):
            built.write(4, b"y")


def test_packets_stay_packets():
    packets = [b"one", b"", b"three", b"4" * 4096, b"5" * 100]

    def prepare():
        _, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
        for packet in packets:
            os.write(writer, packet)

    with brought_back(prepare) as (record, built):
        assert status_flags(built.capture()) == status_flags(record)
        built.write(4, b"new")
        expected = [packet for packet in packets if packet]
        assert [built.read(3, 65536) for _ in expected] == expected
        assert built.read(3, 65536) == b"new"


def test_packets_of_a_pipe_that_is_none_any_more():
    def prepare():
        _, writer = os.pipe2(os.O_DIRECT)
        os.write(writer, b"one")
        os.write(writer, b"two")
        fcntl.fcntl(writer, fcntl.F_SETFL, 0)

    with brought_back(prepare) as (record, built):
        assert status_flags(built.capture()) == status_flags(record)
        assert [built.read(3, 100), built.read(3, 100)] == [b"one", b"two"]


def test_several_descriptions_of_one_pipe():
    def prepare():
        os.pipe()  # 3, 4
        os.open("/proc/self/fd/3", os.O_RDONLY | os.O_NONBLOCK)  # 5
        os.open("/proc/self/fd/4", os.O_WRONLY | os.O_CLOEXEC)  # 6
        os.open("/proc/self/fd/3", os.O_RDWR)  # 7
        os.dup2(6, 8)
        os.write(4, b"common")

    with brought_back(prepare) as (record, built):
        again = built.capture()
        assert status_flags(again) == status_flags(record)
        assert again.fds == record.fds
        assert built.read(5, 3) == b"com"
        assert built.read(7, 3) == b"mon"
        with pytest.raises(BlockingIOError):
            built.read(5, 1)
        assert built.write(8, b"written by a duplicate") == 22
        assert built.read(3, 100) == b"written by a duplicate"


def test_only_a_reader_is_left():
    def prepare():
        _, writer = os.pipe()
        os.write(writer, b"last words")
        os.close(writer)

    with brought_back(prepare) as (_, built):
        assert built.read(3, 100) == b"last words"
        assert built.read(3, 100) == b""


def test_only_a_writer_is_left():
    def prepare():
        reader, writer = os.pipe2(os.O_NONBLOCK)
        os.write(writer, b"never read")
        os.close(reader)

    with brought_back(prepare) as (record, built):
        assert status_flags(built.capture()) == status_flags(record)
        with pytest.raises(OSError, match=os.strerror(errno.EPIPE)):
            built.write(4, b"x")


def test_only_a_description_for_both_is_left():
    def prepare():
        os.pipe()
        os.open("/proc/self/fd/3", os.O_RDWR)
        os.write(4, b"kept")
        os.close(3)
        os.close(4)

    with brought_back(prepare) as (_, built):
        assert built.read(5, 100) == b"kept"
        assert built.write(5, b"to myself") == 9
        assert built.read(5, 100) == b"to myself"


@contextlib.contextmanager
def pipe_ends():
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("which", [0, 1], ids=["read end", "write end"])
def test_a_pipe_to_another_process_is_refused(which):
    with pipe_ends() as ends, opened_by(fds={500: ends[which]}) as pid:
        (found,) = look(pid)
    assert found.startswith("fd 500 (pipe:[")
    assert "is a pipe whose other end is in another process" in found


def test_a_pipe_that_another_process_shares_is_refused():
    with pipe_ends() as (reader, writer), opened_by(fds={500: reader, 501: writer}) as pid:
        found = look(pid)
    assert len(found) == 2
    assert all(f"is a pipe that process {os.getpid()} has open too" in line for line in found)


def test_what_was_opened_after_the_look_is_refused_by_the_capture():
    with pipe_ends() as (reader, _), opened_by(fds={500: reader}) as pid:
        target = Target(pid, FEATURES, {"files": {}})
        with (
            freeze(pid, ptrace.Option.NONE) as frozen,
            pytest.raises(UnsupportedState, match="fd 500"),
        ):
            next(FILES.capture(Stopped(frozen, frozen.leader, FEATURES, target.notes, target.tree)))
        target.tree.forget()
