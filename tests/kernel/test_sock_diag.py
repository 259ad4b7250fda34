"""What the kernel tells of sockets: messages as they come, and those of our own sockets."""

import os
import socket
import struct

import pytest

from ckpt.kernel import sock_diag
from ckpt.kernel.sock_diag import parse_attributes, read_unix_sockets


def attribute(kind, value):
    padding = bytes(-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + value + padding


def test_attributes_are_padded_and_may_be_nested():
    data = attribute(1, b"x") + attribute(2, b"four") + attribute(0x8003, b"")
    assert parse_attributes(memoryview(data)) == {1: b"x", 2: b"four", 3: b""}


def test_an_attribute_that_is_cut_short_ends_the_list():
    data = attribute(1, b"x") + struct.pack("=HH", 2, 7)
    assert parse_attributes(memoryview(data)) == {1: b"x"}


def told_of(sock):
    return read_unix_sockets()[os.fstat(sock.fileno()).st_ino]


@pytest.fixture(autouse=True)
def _needs_unix_diag():
    try:
        read_unix_sockets()
    except OSError as error:
        pytest.skip(f"no unix_diag here: {error}")


def test_a_pair_is_told_of_with_its_queues():
    one, other = socket.socketpair()
    with one, other:
        one.send(b"hello")
        one.shutdown(socket.SHUT_WR)
        first, second = told_of(one), told_of(other)
    assert (first.peer, second.peer) == (second.inode, first.inode)
    assert (first.receive_queue, second.receive_queue) == (0, 5)
    assert first.send_queue > 0
    assert (first.shutdown, second.shutdown) == (2, 1)
    assert not first.name
    assert first.kind == socket.SOCK_STREAM


def test_a_listener_is_told_of_with_who_waits(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen(7)
        client.connect(path)
        told, waits = told_of(listener), told_of(client)
        assert told.file == os.stat(path).st_ino & 0xFFFF_FFFF
    assert told.listens
    assert told.name == os.fsencode(path)
    assert (told.waiting, told.send_queue) == ((waits.inode,), 7)
    assert (waits.peer, waits.shutdown) == (0, 0)


@pytest.mark.parametrize("name", [b"\0abstract\0", b"\0"])
def test_abstract_names_keep_their_zero_bytes(name):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name + b"%d" % os.getpid() + b"\0")
        assert told_of(sock).name == name + b"%d\0" % os.getpid()
        assert told_of(sock).peer is None


def test_the_kernel_says_what_it_does_not_know():
    with pytest.raises(OSError, match=r"."):
        list(sock_diag.dump(bytes([255] * 24)))
