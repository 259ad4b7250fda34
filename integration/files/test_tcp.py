"""Listening TCP sockets: address, options, backlog; and what other sockets are refused."""

import os
import socket
import struct

import pytest

from ckpt.resources.files.table import FILES
from integration.files.processes import FEATURES, brought_back, capture, look, opened_by, rebuilt

FAMILIES = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def listening(family=socket.AF_INET, *, address=None, options=(), backlog=5, number=3):
    """Make a listening socket at a free port, under a number."""
    sock = socket.socket(family)
    for level, option, value in options:
        sock.setsockopt(level, option, value)
    sock.bind((address or FAMILIES[family], 0))
    sock.listen(backlog)
    if sock.fileno() != number:
        os.dup2(sock.fileno(), number)
    return sock


def tcp_of(record):
    return [d.record for d in record.descriptions if d.kind == "tcp"]


@pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
def test_a_listening_socket_comes_back_and_takes_connections(family):
    def prepare():
        sock = listening(family, backlog=77)
        sock.setblocking(False)
        return sock

    with brought_back(prepare) as (record, built):
        (tcp,) = tcp_of(record)
        assert built.capture() == record
        assert tcp.backlog == 77
        address = (FAMILIES[family], tcp.port)
        with socket.create_connection(address, timeout=5) as client:
            assert client.getpeername()[1] == tcp.port
            (found,) = look(built.pid)
            assert "is a listening TCP socket, and 1 connection waits to be accepted" in found


OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
    (socket.SOL_SOCKET, socket.SO_REUSEPORT, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000),
    (socket.SOL_SOCKET, socket.SO_SNDBUF, 60_000),
    (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 7)),
    (socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 3, 500_000)),
    (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0"),
    (socket.SOL_SOCKET, socket.SO_MARK, 77),
    (socket.IPPROTO_IP, 15, 1),  # IP_FREEBIND
    (socket.IPPROTO_IP, socket.IP_TRANSPARENT, 1),
    (socket.IPPROTO_IP, socket.IP_TOS, 16),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 100),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12345),
    (socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 9),
    (socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno"),
]


def test_all_options_come_back():
    with brought_back(lambda: listening(options=OPTIONS)) as (record, built):
        (tcp,) = tcp_of(record)
        assert built.capture() == record
    assert tcp.numbers["SO_REUSEADDR"] == 1
    assert (tcp.receive_buffer_bytes, tcp.send_buffer_bytes) == (50_000, 60_000)
    assert tcp.numbers["TCP_NODELAY"] == 1
    assert tcp.numbers["TCP_MAXSEG"] == 1000
    assert tcp.structs["SO_BINDTODEVICE"].rstrip(b"\0") == b"lo"


@pytest.mark.parametrize("v6_only", [0, 1])
def test_v6_only_is_kept(v6_only):
    option = (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6_only)

    def prepare():
        return listening(socket.AF_INET6, address="::", options=[option])

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        assert tcp_of(record)[0].numbers["IPV6_V6ONLY"] == v6_only


def test_address_reuse_stays_off_where_it_was():
    with brought_back(listening) as (record, built):
        assert tcp_of(record)[0].numbers["SO_REUSEADDR"] == 0
        assert built.capture() == record


def test_several_sockets_share_a_port():
    reuse = [(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)]

    def prepare():
        first = listening(options=reuse)
        second = socket.socket()
        second.setsockopt(*reuse[0])
        second.bind(first.getsockname())
        second.listen(3)
        return first, second

    with brought_back(prepare) as (record, built):
        assert len({tcp.port for tcp in tcp_of(record)}) == 1
        assert built.capture() == record


def test_sockets_that_do_not_listen():
    def prepare():
        fresh, bound = socket.socket(), socket.socket(socket.AF_INET6)
        bound.bind(("::1", 0))
        return fresh, bound

    with brought_back(prepare) as (record, built):
        assert [tcp.backlog for tcp in tcp_of(record)] == [-1, -1]
        assert [bool(tcp.port) for tcp in tcp_of(record)] == [False, True]
        assert built.capture() == record


@pytest.mark.parametrize("reuse", [1, 0])
def test_closed_connections_of_the_old_process(reuse):
    """They wait a minute in TIME_WAIT, and keep the port where SO_REUSEADDR was not set."""

    def prepare():
        sock = listening(options=[(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)])
        with socket.create_connection(sock.getsockname()) as client:
            accepted, _ = sock.accept()
            # Who closes first waits.
            accepted.close()
            assert client.recv(1) == b""
        return sock

    with opened_by(prepare) as pid:
        record = capture(pid)
    found = [str(finding) for finding in FILES.check_host(record, FEATURES)]
    if reuse:
        assert found == []
        with rebuilt(record, pid) as built:
            assert built.capture() == record
    else:
        assert len(found) == 1
        assert "its closed connections take a minute" in found[0]


def test_a_port_that_is_taken_is_named():
    with opened_by(listening) as pid:
        record = capture(pid)
        port = tcp_of(record)[0].port
        found = [str(finding) for finding in FILES.check_host(record, FEATURES)]
    assert len(found) == 1
    assert f"cannot be bound to 127.0.0.1:{port} here (Address already in use)" in found[0]


def test_other_sockets_are_refused_by_name():
    def prepare():
        return (
            socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262),  # IPPROTO_MPTCP
            socket.socket(40, socket.SOCK_STREAM),  # AF_VSOCK
        )

    with opened_by(prepare) as pid:
        found = look(pid)
    assert [line.split("): ")[1].split(", which")[0] for line in found] == [
        "is a socket of IPv4, protocol 262",
        "is a family 40 socket",
    ]
