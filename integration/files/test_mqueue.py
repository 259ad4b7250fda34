"""POSIX message queues: opened again by their names, made anew where they are missing and empty."""

import contextlib
import ctypes
import os
import struct

import pytest

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address, syscall
from ckpt.kernel.mqueue import Attributes, mq_getattr, mq_open, mq_unlink
from ckpt.process.remote import Out, call
from ckpt.resources.base import RestoreOptions
from ckpt.resources.files.table import FILES
from integration.files.processes import brought_back, capture, look, opened_by
from integration.resources.confined import libc, succeed

NAME = f"ckpt-test-{os.getpid()}"
ATTRIBUTES = Attributes(7, 100, 0)
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL
_CLONE_NEWIPC = 0x0800_0000


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    with contextlib.suppress(FileNotFoundError):
        mq_unlink(NAME)


def make(flags=0):
    return mq_open(NAME, _CREATE | flags, 0o620, ATTRIBUTES)


def send(fd, text, priority=0):
    syscall(NR.mq_timedsend, fd, readable_address(text)[0], len(text), priority, 0)


def queues(record):
    return [one.record for one in record.descriptions if one.kind == "mqueue"]


def test_a_queue_is_opened_again_with_its_messages():
    def prepare():
        fd = make(os.O_NONBLOCK)
        send(fd, b"hello", 3)
        os.dup2(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY), 9)

    with brought_back(prepare) as (_, built):
        (reply,) = built.run([call(NR.mq_timedreceive, 3, Out(100), 100, 0, 0)])
        assert reply.outs[0][: reply.value] == b"hello"
        again, other = built.run([call(NR.fcntl, 3, 3), call(NR.fcntl, 9, 3)])
        assert again.value & (os.O_ACCMODE | os.O_NONBLOCK) == os.O_RDWR | os.O_NONBLOCK
        assert other.value & (os.O_ACCMODE | os.O_NONBLOCK) == os.O_WRONLY


@pytest.mark.parametrize("unlinked", [False, True])
def test_an_empty_queue_is_made_anew(unlinked):
    def prepare():
        fd = make()
        os.fchown(fd, 1000, 1001)
        os.fchmod(fd, 0o620)
        if unlinked:
            mq_unlink(NAME)
            os.open(f"/proc/self/fd/{fd}", os.O_RDWR)

    def remove():
        with contextlib.suppress(FileNotFoundError):
            mq_unlink(NAME)

    with brought_back(prepare, meanwhile=remove) as (record, built):
        assert queues(built.capture())[0].name == queues(record)[0].name
        path = f"/proc/{built.pid}/fd/3"
        status = os.stat(path)
        assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o620, 1000, 1001)
        assert status.st_nlink == (0 if unlinked else 1)
        fd = os.open(path, os.O_RDWR)
        try:
            assert mq_getattr(fd) == ATTRIBUTES
        finally:
            os.close(fd)
        if unlinked:
            assert os.path.samestat(status, os.stat(f"/proc/{built.pid}/fd/4"))


def test_messages_without_a_name_are_named():
    def prepare():
        send(make(), b"hello")
        mq_unlink(NAME)

    with opened_by(prepare) as child:
        (finding,) = look(child)
    assert "1 messages that ends with the process" in str(finding)


def test_messages_in_a_namespace_of_its_own_are_named():
    def prepare():
        succeed(libc.unshare(_CLONE_NEWIPC))
        send(make(), b"hello")

    with opened_by(prepare) as child:
        (finding,) = look(child)
    assert "1 messages that ends with the process" in str(finding)


def test_a_notification_is_named():
    def prepare():
        event = ctypes.create_string_buffer(struct.pack("<Qii48x", 0, 10, 0))
        syscall(NR.mq_notify, make(), ctypes.addressof(event))

    with opened_by(prepare) as child:
        (finding,) = look(child)
    assert f"is to notify process {child}" in str(finding)


def test_a_missing_queue_that_had_messages_is_named():
    def prepare():
        send(make(), b"hello")

    with opened_by(prepare) as child:
        record = capture(child)
    mq_unlink(NAME)
    assert "had 1 messages" in problems_of(record)


def test_another_queue_of_its_name_is_named():
    with opened_by(make) as child:
        record = capture(child)
    mq_unlink(NAME)
    os.close(mq_open(NAME, _CREATE, 0o600, Attributes(3, 100, 0)))
    assert "is another queue now" in problems_of(record)


def problems_of(record):
    return " ".join(map(str, FILES.check_files(record, RestoreOptions())))
