"""Every option that a socket of TCP or UDP takes is what it was, also those nobody thought of.

All numbers that the kernel knows are tried: what can be given another value is given one, and read
again from the socket that was brought back.
"""

import array
import contextlib
import json
import os
import socket
import struct

import pytest

from integration.files.processes import brought_back
from integration.files.unix_sockets import lent

SOL, IP, IPV6, TCP, UDP = 1, 0, 41, 6, 17
FAMILIES = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
MOST = 128
N_OPTIONS = 140
LEFT_ALONE = {
    (SOL, 1): "SO_DEBUG does nothing",
    (SOL, 44): "SO_LOCK_FILTER has a test of its own",
    (SOL, 49): "SO_INCOMING_CPU is said to be lost",
    (SOL, 72): "SO_BUF_LOCK alone has no meaning",
    (TCP, 2): "TCP_MAXSEG of a connection is told as it is, not as it was set",
    (TCP, 9): "TCP_DEFER_ACCEPT is for listeners, with a test of its own",
    (TCP, 12): "TCP_QUICKACK lasts for a moment",
    (TCP, 19): "TCP_REPAIR is ours",
    (TCP, 20): "TCP_REPAIR_QUEUE is ours",
    (TCP, 21): "TCP_QUEUE_SEQ is ours",
    (TCP, 24): "TCP_TIMESTAMP goes on",
    (TCP, 27): "TCP_SAVE_SYN is for listeners, with a test of its own",
}
# What concerns multicast has no meaning for a stream.
OF_STREAMS = {(IP, 33), (IP, 34), (IP, 49), (IPV6, 17), (IPV6, 18), (IPV6, 19), (IPV6, 29)}
ACCEPT_ALL = [(6, 0, 0, 0xFFFF)]
SO_ATTACH_FILTER, SO_GET_FILTER, SO_LOCK_FILTER = 26, 26, 44


def levels_of(sock):
    of_protocol = UDP if sock.type == socket.SOCK_DGRAM else TCP
    return [SOL, IP, of_protocol, *[IPV6] * (sock.family == socket.AF_INET6)]


def iter_numbers(sock):
    """Yield every option with an int for a value."""
    for level in levels_of(sock):
        for option in range(1, N_OPTIONS):
            if (level, option) in LEFT_ALONE:
                continue
            if sock.type == socket.SOCK_STREAM and (level, option) in OF_STREAMS:
                continue
            with contextlib.suppress(OSError):
                value = sock.getsockopt(level, option, MOST)
                if len(value) == 4:
                    yield (level, option), struct.unpack("i", value)[0]


def change(sock):
    """Give every option another value that takes one, and return all that have changed."""
    before = dict(iter_numbers(sock))
    for (level, option), value in before.items():
        for other in (value ^ 1, value + 8, 1, 100):
            with contextlib.suppress(OSError):
                sock.setsockopt(level, option, other)
                if sock.getsockopt(level, option) != value:
                    break
    return {key: value for key, value in iter_numbers(sock) if before.get(key) != value}


def udp(family):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((FAMILIES[family], 0))
    return [sock]


def listening(family):
    sock = socket.socket(family)
    sock.bind((FAMILIES[family], 0))
    sock.listen(5)
    return [sock]


def connected(family):
    """Return both ends, the calling one under number 3."""
    (listener,) = listening(family)
    caller = socket.create_connection(listener.getsockname()[:2])
    accepted, _ = listener.accept()
    os.dup2(caller.fileno(), listener.fileno())
    caller.close()
    caller = socket.socket(fileno=listener.detach())
    return [caller, accepted]


every_socket = pytest.mark.parametrize("make", [udp, listening, connected])
every_family = pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])


@every_socket
@every_family
def test_every_option_is_what_it_was(make, family, tmp_path):
    told = tmp_path / "told"

    def prepare():
        socks = make(family)
        told.write_text(json.dumps([(*key, value) for key, value in change(socks[0]).items()]))
        return socks

    with brought_back(prepare) as (_, built), lent(built.pid, 3) as sock:
        now = dict(iter_numbers(sock))
    was = {(level, option): value for level, option, value in json.loads(told.read_text())}
    assert len(was) > 30
    assert {key: value for key, value in now.items() if key in was} == was


def attach(sock, steps):
    code = array.array("B", b"".join(struct.pack("HBBI", *step) for step in steps))
    sock.setsockopt(SOL, SO_ATTACH_FILTER, struct.pack("HP", len(steps), code.buffer_info()[0]))


def n_steps(sock):
    """Return how many instructions a socket's filter has."""
    import ctypes

    n = ctypes.c_uint32(0)
    libc = ctypes.CDLL(None)
    assert libc.getsockopt(sock.fileno(), SOL, SO_GET_FILTER, None, ctypes.byref(n)) == 0
    return n.value


@every_socket
@every_family
@pytest.mark.parametrize("locked", [0, 1])
def test_a_packet_filter_comes_back(make, family, locked):
    def prepare():
        socks = make(family)
        attach(socks[0], ACCEPT_ALL)
        socks[0].setsockopt(SOL, SO_LOCK_FILTER, locked)
        return socks

    with brought_back(prepare) as (_, built), lent(built.pid, 3) as sock:
        assert n_steps(sock) == len(ACCEPT_ALL)
        assert sock.getsockopt(SOL, SO_LOCK_FILTER) == locked
        with pytest.raises(PermissionError) if locked else contextlib.nullcontext():
            attach(sock, ACCEPT_ALL)


@every_family
def test_a_filter_of_datagrams_still_filters(family):
    """It takes three bytes (behind the header's eight), and what waits has come before it."""
    header = 8

    def prepare():
        (sock,) = udp(family)
        sender = socket.socket(family, socket.SOCK_DGRAM)
        sender.connect(sock.getsockname())
        sender.send(b"before it")
        attach(sock, [(0x80, 0, 0, 0), (0x15, 0, 1, header + 3), *ACCEPT_ALL, (6, 0, 0, 0)])
        return sock, sender

    with brought_back(prepare) as (_, built), lent(built.pid, 3, 4) as (sock, sender):
        sender.send(b"four")
        sender.send(b"two")
        assert [sock.recv(100), sock.recv(100)] == [b"before it", b"two"]


@every_family
def test_a_filter_of_a_listener_is_inherited(family):
    def prepare():
        (sock,) = listening(family)
        attach(sock, ACCEPT_ALL)
        return sock

    with (
        brought_back(prepare) as (_, built),
        lent(built.pid, 3) as listener,
        socket.create_connection(listener.getsockname()[:2]),
    ):
        accepted, _ = listener.accept()
        with accepted:
            assert n_steps(accepted) == len(ACCEPT_ALL)
