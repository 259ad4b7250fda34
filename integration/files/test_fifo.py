"""Named pipes: ends, content, size, hang-ups; and those that lead out of the process."""

import fcntl
import os
import select
import struct

import pytest

from ckpt.errors import RestoreFailed
from ckpt.kernel.arch import NR
from ckpt.process.remote import InOut, call
from ckpt.resources.base import RestoreOptions
from ckpt.resources.files.table import FILES
from integration.files.processes import brought_back, capture, look, opened_by, rebuilt

NONBLOCK = os.O_NONBLOCK


@pytest.fixture
def fifo(tmp_path):
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    return path


def poll(built, fd, events=select.POLLIN):
    (reply,) = built.run([call(NR.poll, InOut(struct.pack("<ihh", fd, events, 0)), 1, 0)])
    assert reply.ok
    return struct.unpack("<ihh", reply.outs[0])[2]


def fifos(record):
    return [one.record for one in record.descriptions if one.kind == "fifo"]


def flags(record):
    return [one.flags for one in record.descriptions]


def test_both_ends_with_content_and_size(fifo):
    def prepare():
        os.open(fifo, os.O_RDONLY | NONBLOCK)  # 3
        os.open(fifo, os.O_WRONLY)  # 4
        os.open(fifo, os.O_RDWR)  # 5
        fcntl.fcntl(3, fcntl.F_SETPIPE_SZ, 1 << 18)
        os.write(4, b"content" * 20_000)
        os.read(3, 3)
        os.dup2(4, 40)

    with opened_by(prepare) as pid:
        record = capture(pid)
        assert fifos(capture(pid)) == fifos(record)
        assert len(fifos(record)[0].content) == 140_000 - 3
    with rebuilt(record, pid) as built:
        again = built.capture()
        assert flags(again) == flags(record)
        assert fifos(again) == fifos(record)
        assert os.readlink(f"/proc/{pid}/fd/3") == fifo
        assert built.read(3, 4) == b"tent"
        for _ in range(3):
            built.read(5, 1 << 16)
        assert built.write(40, b"more") == 4
        assert built.read(5, 100) == b"more"
        with pytest.raises(BlockingIOError):
            built.read(3, 1)


def test_the_only_reader_of_one_that_hung_up(fifo):
    def prepare():
        reader = os.open(fifo, os.O_RDONLY | NONBLOCK)
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b"last words")
        os.close(writer)
        os.open(fifo, os.O_RDONLY | NONBLOCK)
        return reader

    with brought_back(prepare) as (record, built):
        assert [one.hung_up for one in fifos(record)] == [True, False]
        assert fifos(built.capture()) == fifos(record)
        assert poll(built, 3) == select.POLLIN | select.POLLHUP
        assert poll(built, 4) == select.POLLIN
        assert built.read(3, 100) == b"last words"
        assert built.read(4, 100) == b""
        assert (poll(built, 3), poll(built, 4)) == (select.POLLHUP, 0)
        with open(fifo, "wb", buffering=0) as writer:
            writer.write(b"again")
            assert built.read(4, 100) == b"again"
        assert poll(built, 4) == select.POLLHUP


def test_the_only_writer_keeps_what_it_wrote(fifo):
    def prepare():
        reader = os.open(fifo, os.O_RDONLY | NONBLOCK)
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b"for whoever comes")
        os.close(reader)

    with brought_back(prepare) as (record, built):
        assert fifos(record)[0].content == b"for whoever comes"
        assert poll(built, 4, select.POLLOUT) & select.POLLERR
        reader = os.open(fifo, os.O_RDONLY | NONBLOCK)
        assert os.read(reader, 100) == b"for whoever comes"
        os.close(reader)


def test_a_blocking_end_stays_one(fifo):
    with brought_back(lambda: os.open(fifo, os.O_RDWR)) as (record, built):
        assert flags(built.capture()) == flags(record)
        assert not flags(record)[1] & NONBLOCK


def test_one_that_somebody_else_has_open_is_refused(fifo):
    ours = os.open(fifo, os.O_RDWR)
    try:
        with opened_by(lambda: os.open(fifo, os.O_WRONLY)) as pid:
            assert look(pid) == [
                f"fd 3 ({fifo}): is a named pipe that process {os.getpid()} has open too"
                f" (dump it with --external '{fifo}', and restore it with --inherit '{fifo}=FD')"
            ]
    finally:
        os.close(ours)


@pytest.mark.parametrize("taken", [False, True])
def test_a_deleted_one_is_made_again_and_deleted(fifo, taken):
    def prepare():
        os.open(fifo, os.O_RDWR)
        os.open(fifo, os.O_WRONLY)
        os.chmod(fifo, 0o640)
        os.chown(fifo, 7, 8)
        os.unlink(fifo)
        os.write(4, b"kept")
        if taken:
            os.mkfifo(fifo)

    with brought_back(prepare) as (record, built):
        status = os.stat(f"/proc/{built.pid}/fd/3")
        assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, 7, 8)
        assert status.st_nlink == 0
        assert os.path.samestat(status, os.stat(f"/proc/{built.pid}/fd/4"))
        link = os.readlink(f"/proc/{built.pid}/fd/3")
        assert link.startswith(fifo)
        assert link.endswith(" (deleted)")
        assert (link == f"{fifo} (deleted)") is not taken
        assert flags(built.capture()) == flags(record)
        assert built.read(3, 10) == b"kept"
        assert os.listdir(os.path.dirname(fifo)) == ["fifo"] * taken


def test_one_that_is_deleted_with_its_directory_is_refused(tmp_path):
    def prepare():
        os.mkdir(tmp_path / "gone")
        os.mkfifo(tmp_path / "gone" / "fifo")
        os.open(tmp_path / "gone" / "fifo", os.O_RDWR)
        os.unlink(tmp_path / "gone" / "fifo")
        os.rmdir(tmp_path / "gone")

    with opened_by(prepare) as pid:
        (finding,) = look(pid)
    assert f"is deleted, and {tmp_path}/gone with it" in finding


def test_as_a_standard_stream_it_may_lead_outside(fifo):
    ours = os.open(fifo, os.O_RDWR)
    try:
        with opened_by(fds={1: ours}) as pid:
            assert look(pid) == []
    finally:
        os.close(ours)


def test_a_name_that_is_gone_or_taken_is_named(fifo):
    with opened_by(lambda: os.open(fifo, os.O_RDWR)) as pid:
        record = capture(pid)
    os.unlink(fifo)
    (finding,) = FILES.check_files(record, RestoreOptions())
    assert "cannot be opened (No such file or directory)" in str(finding)
    with open(fifo, "w"):
        (finding,) = FILES.check_files(record, RestoreOptions())
    assert "is no named pipe any more" in str(finding)


def test_content_of_others_is_not_mixed_with_ours(fifo):
    with opened_by(lambda: os.open(fifo, os.O_RDWR)) as pid:
        record = capture(pid)
    ours = os.open(fifo, os.O_RDWR)
    try:
        os.write(ours, b"theirs")
        with (
            pytest.raises(RestoreFailed, match="there is something in it already"),
            rebuilt(record, pid),
        ):
            pass
    finally:
        os.close(ours)
