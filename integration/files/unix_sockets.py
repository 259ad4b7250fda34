"""What the tests of unix sockets share: sockets under known numbers, and their records."""

import contextlib
import os
import socket
import struct
from socket import AF_UNIX, SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM

import attrs
import pytest

from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open

KINDS = {SOCK_STREAM: "stream", SOCK_DGRAM: "dgram", SOCK_SEQPACKET: "seqpacket"}
PACKETS = [SOCK_DGRAM, SOCK_SEQPACKET]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=KINDS.get)
connected_kinds = pytest.mark.parametrize("kind", [SOCK_STREAM, SOCK_SEQPACKET])


def unix_of(record):
    """Return the records of all unix sockets, with their places for inode numbers."""
    records = [d.record for d in record.descriptions if d.kind == "unix"]
    place = {one.socket: 1 + number for number, one in enumerate(records)}
    return [
        attrs.evolve(
            one,
            socket=place[one.socket],
            peer=place.get(one.peer, 0),
            waiting=tuple(place[client] for client in one.waiting),
        )
        for one in records
    ]


def _but_for_file(record):
    """What it is, but for which file has its name."""
    return attrs.asdict(attrs.evolve(record, file_inode=0, file_changed_ns=0))


def assert_same(built, record):
    again = built.capture()
    for one, other in zip(unix_of(again), unix_of(record), strict=True):
        assert _but_for_file(one) == _but_for_file(other)
    assert [d.flags for d in again.descriptions] == [d.flags for d in record.descriptions]


@contextlib.contextmanager
def lent(pid, *fds):
    """Lend sockets of another process; what is done to them is done to its own."""
    pidfd = pidfd_open(pid)
    socks = [socket.socket(fileno=pidfd_getfd(pidfd, fd, pid=pid)) for fd in fds]
    os.close(pidfd)
    try:
        yield socks if len(socks) > 1 else socks[0]
    finally:
        for sock in socks:
            sock.close()


def pair(kind=SOCK_STREAM):
    """Make a pair under 3 and 4."""
    return socket.socketpair(AF_UNIX, kind)


def bound(kind, name):
    sock = socket.socket(AF_UNIX, kind)
    sock.bind(name)
    return sock


def peer_of(sock):
    return struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
