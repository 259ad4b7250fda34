"""Pairs of unix sockets: queues, ends, credentials, options; and what leads out of the tree."""

import array
import contextlib
import os
import socket
import struct
from socket import SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM

import pytest

from ckpt.errors import UnsupportedState
from ckpt.kernel.arch import NR
from ckpt.kernel.libc import syscall
from integration.files.processes import (
    brought_back,
    capture,
    opened_by,
    rebuilt,
)
from integration.files.unix_sockets import (
    KINDS,
    PACKETS,
    assert_same,
    connected_kinds,
    every_kind,
    lent,
    pair,
    unix_of,
)

# ---- pairs


@every_kind
def test_a_pair_is_connected_again(kind):
    with brought_back(lambda: pair(kind)) as (record, built):
        assert_same(built, record)
        with lent(built.pid, 3, 4) as (one, other):
            one.send(b"there")
            other.send(b"and back")
            assert (other.recv(100), one.recv(100)) == (b"there", b"and back")


@every_kind
def test_what_was_not_read_comes_back_and_stays_in_the_original(kind):
    def prepare():
        one, other = pair(kind)
        for part in (b"a" * 10, b"b" * 70_000, b"c"):
            one.send(part)
        other.send(b"the other way")
        return one, other

    with opened_by(prepare) as pid:
        record = capture(pid)
        assert unix_of(capture(pid)) == unix_of(record)
    with rebuilt(record, pid) as built:
        assert_same(built, record)
        with lent(built.pid, 3, 4) as (one, other):
            assert one.recv(100) == b"the other way"
            if kind == SOCK_STREAM:
                assert other.recv(100_000) == b"a" * 10 + b"b" * 70_000 + b"c"
            else:
                assert other.recv(100) == b"a" * 10
                assert other.recv(100_000) == b"b" * 70_000
                assert other.recv(100) == b"c"


@pytest.mark.parametrize("kind", PACKETS, ids=KINDS.get)
def test_packets_of_no_bytes_keep_their_places(kind):
    def prepare():
        one, other = pair(kind)
        for part in (b"", b"first", b"", b"", b"last", b""):
            one.send(part)
        return one, other

    with brought_back(prepare) as (record, built):
        assert [m.data for m in unix_of(record)[1].messages] == [
            *(b"", b"first", b"", b"", b"last", b"")
        ]
        with lent(built.pid, 4) as other:
            got = [other.recv(100) for _ in range(6)]
            assert got == [b"", b"first", b"", b"", b"last", b""]
            with pytest.raises(BlockingIOError):
                other.recv(100, socket.MSG_DONTWAIT)


@pytest.mark.parametrize("kind", PACKETS, ids=KINDS.get)
def test_packets_of_no_bytes_that_were_looked_at_once_are_not_lost(kind):
    """The kernel does not show them a second time: what cannot be told is refused, then."""

    def prepare():
        one, other = pair(kind)
        for part in (b"first", b"", b"x" * 50_000):
            one.send(part)
        return one, other

    with opened_by(prepare) as pid:
        record = capture(pid)
        with pytest.raises(UnsupportedState, match="holds packets of no bytes"):
            capture(pid)
        with lent(pid, 4) as other:
            assert [len(other.recv(100_000)) for _ in range(3)] == [5, 0, 50_000]
        capture(pid)
    assert [len(m.data) for m in unix_of(record)[1].messages] == [5, 0, 50_000]


def test_a_packet_as_big_as_a_send_buffer_comes_back():
    def prepare():
        one, other = pair(SOCK_DGRAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
        one.send(os.urandom(300_000))
        one.send(b"behind it")
        one.send(bytes(50_000))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50_000)
        return one, other

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        sizes = [len(message.data) for message in unix_of(record)[1].messages]
        assert sizes == [300_000, 9, 50_000]


@connected_kinds
@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_half_closed_pairs(kind, how):
    def prepare():
        one, other = pair(kind)
        one.send(b"before")
        other.send(b"before, too")
        one.shutdown(how)
        return one, other

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        with lent(built.pid, 3, 4) as (one, other):
            assert other.recv(100) == b"before"
            if how != socket.SHUT_RD:
                assert other.recv(100) == b""
                with pytest.raises(BrokenPipeError):
                    one.send(b"x")


@every_kind
def test_the_other_end_has_gone(kind):
    def prepare():
        one, other = pair(kind)
        one.send(b"my last words")
        one.close()
        return other

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        with lent(built.pid, 4) as other:
            assert other.recv(100) == b"my last words"
            if kind == SOCK_DGRAM:
                with pytest.raises(ConnectionRefusedError):
                    other.send(b"x")
            else:
                assert other.recv(100) == b""


@connected_kinds
def test_the_other_end_has_gone_and_did_not_read_all(kind):
    def prepare():
        one, other = pair(kind)
        other.send(b"unread")
        one.close()
        return other

    with brought_back(prepare) as (record, built):
        assert unix_of(record)[0].was_reset
        assert_same(built, record)
        with lent(built.pid, 4) as other, pytest.raises(ConnectionResetError):
            other.recv(100)


@every_kind
def test_an_end_that_the_user_replaces_has_gone_for_the_other(kind):
    def prepare():
        one, other = pair(kind)
        one.send(b"before")
        return one, other

    with brought_back(prepare, inherit={3: "/dev/null"}) as (_, built):
        assert built.read(3, 10) == b""
        with lent(built.pid, 4) as other:
            assert other.recv(100) == b"before"
            with pytest.raises((BrokenPipeError, ConnectionRefusedError)):
                other.send(b"x")


def test_credentials_that_wait_with_messages():
    """Of the process itself, of one that has ended, of other users, and of nobody."""

    def as_user(sock, uid, text):
        if os.fork() == 0:
            os.setresuid(uid, uid, uid)
            sock.send(text)
            os._exit(0)
        os.wait()

    def prepare():
        one, other = pair()
        one.send(b"nobody asked ")
        other.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        one.send(b"myself ")
        as_user(one, 1234, b"gone")
        return one, other

    with opened_by(prepare) as pid:
        record = capture(pid)
        messages = unix_of(record)[1].messages
        assert [message.data for message in messages] == [b"nobody asked ", b"myself ", b"gone"]
        assert [message.uid for message in messages] == [65534, 0, 1234]
        assert messages[1].pid == pid
    with rebuilt(record, pid) as built:
        assert_same(built, record)
        with lent(built.pid, 4) as other:
            other.recvmsg(5)
            assert other.getsockname() == ""
            data, control, _, _ = other.recvmsg(100, 100)
    assert data == b"y asked "
    assert control[0][:2] == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)


# ---- options


def test_all_options_come_back():
    options = [
        (socket.SO_SNDBUF, 50_000),
        (socket.SO_RCVBUF, 60_000),
        (socket.SO_PASSCRED, 1),
        (socket.SO_PRIORITY, 7),
        (socket.SO_MARK, 77),
        (socket.SO_RCVLOWAT, 3),
        (socket.SO_LINGER, struct.pack("ii", 1, 7)),
        (socket.SO_RCVTIMEO, struct.pack("qq", 3, 500_000)),
        (socket.SO_SNDTIMEO, struct.pack("qq", 4, 0)),
        (34, 1),  # SO_PASSSEC
        (42, 2),  # SO_PEEK_OFF
        (29, 1),  # SO_TIMESTAMP
    ]

    def prepare():
        one, other = pair(SOCK_SEQPACKET)
        one.send(b"first")
        one.send(b"second")
        for option, value in options:
            other.setsockopt(socket.SOL_SOCKET, option, value)
        other.setblocking(False)
        return one, other

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        kept = unix_of(record)[1].options
        assert (kept.send_buffer_bytes, kept.receive_buffer_bytes) == (50_000, 60_000)
        assert (kept.numbers["SO_PASSCRED"], kept.numbers["SO_PEEK_OFF"]) == (1, 2)
        assert [m.data for m in unix_of(record)[1].messages] == [b"first", b"second"]


@pytest.mark.parametrize("locked", [0, 1])
def test_a_packet_filter_comes_back(locked):
    """It takes packets of three bytes and no others; those that wait have come before it."""
    code = b"".join(
        struct.pack("HBBI", *step)
        for step in [(0x80, 0, 0, 0), (0x15, 0, 1, 3), (6, 0, 0, 0xFFFF), (6, 0, 0, 0)]
    )
    buffer = array.array("B", code)
    program = struct.pack("HP", len(code) // 8, buffer.buffer_info()[0])

    def prepare():
        one, other = pair(SOCK_DGRAM)
        one.send(b"before it")
        other.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER
        other.setsockopt(socket.SOL_SOCKET, 44, locked)  # SO_LOCK_FILTER
        return one, other

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        assert unix_of(record)[1].options.packet_filter == code
        with lent(built.pid, 3, 4) as (one, other):
            with contextlib.suppress(PermissionError):
                one.send(b"four")
            one.send(b"two"[:3])
            assert [other.recv(100), other.recv(100)] == [b"before it", b"two"]


def test_sockets_of_a_network_namespace_of_its_own():
    def prepare():
        syscall(NR.unshare, 0x4000_0000)  # CLONE_NEWNET
        one, other = pair()
        one.send(b"before")
        return one, other

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        with lent(built.pid, 4) as other:
            assert other.recv(100) == b"before"
