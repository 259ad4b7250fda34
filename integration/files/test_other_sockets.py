"""Netlink, packet and raw sockets: what comes back, what is refused, what is lost aloud."""

import socket
import struct

import pytest

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import syscall
from ckpt.kernel.namespaces import Namespace, set_loopback_up
from integration.files.processes import brought_back, capture, look, opened_by

SOL_NETLINK, SOL_PACKET = 270, 263
NETLINK_ADD_MEMBERSHIP, NETLINK_EXT_ACK = 1, 11
PACKET_ADD_MEMBERSHIP, PACKET_RX_RING, PACKET_AUXDATA, PACKET_FANOUT = 1, 5, 8, 18
RTM_GETLINK, NLM_F_REQUEST_DUMP = 18, 0x301


def netlink(protocol=0):
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)


def packet(kind=socket.SOCK_RAW, protocol=0x800):
    sock = socket.socket(socket.AF_PACKET, kind, 0)
    sock.bind(("lo", protocol))
    return sock


def unshare_net():
    syscall(NR.unshare, Namespace.NET)


def records_of(record, kind):
    return [d.record for d in record.descriptions if d.kind == kind]


def problems(prepare):
    with opened_by(prepare) as pid:
        return [line.split("): ", 1)[1] for line in look(pid)]


def test_netlink_keeps_port_groups_and_options():
    def prepare():
        fresh, bound = netlink(), netlink()
        bound.bind((0, 1))
        bound.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, 36)
        bound.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        return fresh, bound

    with brought_back(prepare) as (record, built):
        fresh, bound = records_of(record, "netlink")
        assert built.capture() == record
        assert (fresh.port, bound.groups) == (0, (1, 36))
        assert bound.port != 0


def test_netlink_still_answers():
    def prepare():
        sock = netlink()
        sock.bind((0, 0))
        return sock

    request = struct.pack("=IHHII", 17, RTM_GETLINK, NLM_F_REQUEST_DUMP, 7, 0) + bytes(1)
    with brought_back(prepare) as (_, built):
        built.write(3, request)
        answer = built.read(3, 30_000)
    assert struct.unpack_from("=IHHI", answer)[1::2] == (16, 7)


def test_netlink_with_messages_or_of_an_unknown_kind_is_refused():
    def prepare():
        asked = netlink()
        asked.send(struct.pack("=IHHII", 17, RTM_GETLINK, NLM_F_REQUEST_DUMP, 1, 0) + bytes(1))
        return asked, netlink(9)

    messages, audit = problems(prepare)
    assert "is a netlink socket with messages that were not read" in messages
    assert "is a netlink socket (audit), which is not supported yet" in audit


@pytest.mark.parametrize("kind", [socket.SOCK_RAW, socket.SOCK_DGRAM])
def test_packet_sockets_keep_interface_protocol_and_promiscuity(kind):
    def prepare():
        sock = packet(kind, protocol=0x88B5)
        lo = socket.if_nametoindex("lo")
        sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, struct.pack("=iHH8s", lo, 1, 0, b""))
        sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        return sock

    with brought_back(prepare) as (record, built):
        (sock,) = records_of(record, "packet")
        assert built.capture() == record
        assert (sock.interface, sock.protocol) == ("lo", 0x88B5)
        assert [(one.interface, one.kind) for one in sock.memberships] == [("lo", 1)]
        with packet(protocol=0) as sender:
            sender.send(bytes(12) + b"\x88\xb5payload")
        assert built.read(3, 100).endswith(b"payload")


def test_packets_that_were_not_read_are_lost_aloud():
    def prepare():
        sock = packet(protocol=0x88B6)
        with packet(protocol=0) as sender:
            sender.send(bytes(12) + b"\x88\xb6lost")
        return sock

    with brought_back(prepare) as (_, built):
        (said,) = built.warnings
    assert said == "packets of lo, protocol 0x88b6: those that were not read are lost"


def test_rings_and_fanout_are_refused():
    def prepare():
        ring, fanout = packet(protocol=0x88B7), packet(protocol=0x88B7)
        ring.setsockopt(SOL_PACKET, PACKET_RX_RING, struct.pack("=4I", 4096, 1, 2048, 2))
        fanout.setsockopt(SOL_PACKET, PACKET_FANOUT, 4711)
        return ring, fanout

    ring, fanout = problems(prepare)
    assert "is a packet socket with a ring" in ring
    assert "is a packet socket of a fanout group" in fanout


@pytest.mark.parametrize(
    ("family", "host", "protocol", "option"),
    [
        (socket.AF_INET, "127.0.0.1", 253, (socket.IPPROTO_IP, socket.IP_HDRINCL, 1)),
        (socket.AF_INET, "127.0.0.1", 1, (255, 1, struct.pack("=I", 0x101))),
        (socket.AF_INET6, "::1", 58, (58, 1, bytes(range(32)))),
    ],
    ids=["v4", "icmp", "icmp6"],
)
def test_raw_sockets_keep_protocol_addresses_and_filters(family, host, protocol, option):
    def prepare():
        fresh = socket.socket(family, socket.SOCK_RAW, protocol)
        fresh.setsockopt(*option)
        connected = socket.socket(family, socket.SOCK_RAW, protocol)
        connected.bind((host, 0))
        connected.connect((host, 0))
        return fresh, connected

    with brought_back(prepare) as (record, built):
        fresh, connected = records_of(record, "raw")
        assert built.capture() == record
        assert (fresh.peer, connected.peer.host) == (None, host)
        assert connected.local.host == host


def test_sockets_of_a_namespace_of_its_own_are_looked_at_from_there():
    def prepare():
        unshare_net()
        set_loopback_up()
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        local = socket.inet_aton("127.0.0.1")
        sock.setsockopt(socket.IPPROTO_IP, 35, socket.inet_aton("239.7.7.3") + local)
        return sock, packet(protocol=0x88B5)

    with opened_by(prepare) as pid:
        record = capture(pid)
    (udp,) = records_of(record, "udp")
    assert [one.group for one in udp.memberships] == ["239.7.7.3"]


def test_a_socket_of_another_namespace_is_refused():
    def prepare():
        before = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        unshare_net()
        return before

    (found,) = problems(prepare)
    assert "is a socket of another network namespace than its process" in found
