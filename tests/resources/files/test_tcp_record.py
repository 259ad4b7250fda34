"""The record of a TCP connection: what it refuses, and what follows from it without a kernel."""

import attrs
import pytest

from ckpt.kernel.tcp_repair import Info, Window
from ckpt.resources.files.inet import InetAddress, flow_between
from ckpt.resources.files.sockopts import SocketOptions
from ckpt.resources.files.tcp_record import TcpConnectionRecord, Transmission

OPTIONS = SocketOptions({}, {}, 0, 0, b"", filter_locked=False)
TRANSMISSION = Transmission(
    *(1000, 2000, b"sent", b"unsent"),
    fin_unsent=False,
    window=Window(1, 2, 3, 4, 5),
    handshake=Info(1, 7, 10, 7, 0, 0, 5),
    clock=9,
    max_segment_bytes=1460,
    window_clamp=65535,
    hold="ckpt_0123456789abcdef",
)
RECORD = TcpConnectionRecord(
    *(1, InetAddress(2, "10.0.0.1", 80), InetAddress(2, "10.0.0.2", 4711), b"received"),
    has_error=False,
    reads_no_more=False,
    transmission=TRANSMISSION,
    options=OPTIONS,
    numbers={"TCP_NODELAY": 1},
    structs={},
    send_buffer_bytes=1 << 20,
    receive_buffer_bytes=1 << 17,
    buffer_locks=0,
)


def test_it_is_named_by_its_addresses():
    assert RECORD.path == "TCP 10.0.0.1:80 to 10.0.0.2:4711"


@pytest.mark.parametrize(
    "change",
    [
        {"state": 10},
        {"state": 2},
        {"peer": None},
        {"transmission": None},
        {"state": 7},
        {"peer": InetAddress(10, "::1", 1)},
        {"numbers": {"SO_NOTHING": 1}},
    ],
    ids=["listening", "under way", "no peer", "no numbers", "ended", "families", "option"],
)
def test_what_is_no_connection_is_refused(change):
    with pytest.raises(ValueError, match=r"."):
        attrs.evolve(RECORD, **change)


@pytest.mark.parametrize(("family", "host"), [(2, "::1"), (10, "127.0.0.1"), (1, "x"), (2, "x")])
def test_what_is_no_address_is_refused(family, host):
    with pytest.raises(ValueError, match=r"is no (internet )?address"):
        InetAddress(family, host, 1)


def test_ipv4_in_sockets_of_ipv6_is_held_as_ipv4():
    here, there = InetAddress(10, "::ffff:10.0.0.1", 1), InetAddress(10, "::ffff:10.0.0.2", 2)
    flow = flow_between(here, there)
    assert (flow.family, flow.local, flow.peer) == (2, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
