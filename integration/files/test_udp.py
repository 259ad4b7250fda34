"""UDP sockets: addresses, options, groups, what was not read; and what is refused."""

import socket
import struct

import attrs
import pytest

from integration.files.processes import brought_back, capture, look, opened_by, rebuilt

FAMILIES = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
every_family = pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])


def bound(family, *, address=None, protocol=0):
    sock = socket.socket(family, socket.SOCK_DGRAM, protocol)
    sock.bind((address or FAMILIES[family], 0))
    return sock


def udp_of(record):
    return [d.record for d in record.descriptions if d.kind == "udp"]


@every_family
@pytest.mark.parametrize("protocol", [0, 136], ids=["udp", "udplite"])
def test_what_was_not_read_comes_back_with_its_senders(family, protocol):
    parts = [b"a", b"b" * 10_000, b"", b"c" * 60_000]

    def prepare():
        sock = bound(family, protocol=protocol)
        senders = [bound(family, protocol=protocol) for _ in range(2)]
        for number, part in enumerate(parts):
            senders[number % 2].sendto(part, sock.getsockname())
        return sock, senders

    with brought_back(prepare) as (record, built):
        sock, *senders = udp_of(record)
        assert [one.data for one in sock.datagrams] == parts
        assert [one.sender.port for one in sock.datagrams] == [s.local.port for s in senders] * 2
        assert built.warnings == []
        for part in parts:
            assert built.read(3, 70_000) == part


@every_family
def test_a_second_dump_sees_the_same(family):
    def prepare():
        sock = bound(family, address=ANY[family])
        sock.setblocking(False)
        client = socket.socket(family, socket.SOCK_DGRAM)
        for part in (b"one", b"two"):
            client.sendto(part, (FAMILIES[family], sock.getsockname()[1]))
        return sock, client

    with opened_by(prepare) as pid:
        record = capture(pid)
        assert capture(pid) == record
    with rebuilt(record, pid) as built:
        assert built.capture() == record


@every_family
def test_a_connected_socket_keeps_its_peer(family):
    with bound(family) as peer:
        at = peer.getsockname()

        def prepare():
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.connect(at)
            half = socket.socket(family, socket.SOCK_DGRAM)
            half.connect(at)
            half.shutdown(socket.SHUT_RD)
            return sock, half

        with brought_back(prepare) as (record, built):
            sock, half = udp_of(record)
            assert sock.peer.port == peer.getsockname()[1]
            assert (sock.shut_down, half.shut_down) == (0, 1)
            for now, was in zip(udp_of(built.capture()), (sock, half), strict=True):
                # bind to one address of IPv6 sets IPV6_V6ONLY, connect does not.
                numbers = now.numbers | {"IPV6_V6ONLY": 0} if ":" in was.local.host else now.numbers
                assert attrs.evolve(now, numbers=numbers) == was
            built.write(3, b"hello")
            data, sender = peer.recvfrom(100)
            assert (data, sender[1]) == (b"hello", sock.local.port)


def test_options_come_back():
    options = [
        (socket.SOL_SOCKET, socket.SO_BROADCAST, 1),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000),
        (socket.IPPROTO_IP, socket.IP_TOS, 16),
        (socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 7),
        (socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0),
        (socket.IPPROTO_IP, 8, 1),  # IP_PKTINFO
        (socket.IPPROTO_UDP, 1, 1),  # UDP_CORK
        (socket.IPPROTO_UDP, 104, 1),  # UDP_GRO
    ]

    def prepare():
        sock = bound(socket.AF_INET)
        for option in options:
            sock.setsockopt(*option)
        return sock

    with brought_back(prepare) as (record, built):
        (udp,) = udp_of(record)
        assert built.capture() == record
    assert (udp.numbers["UDP_CORK"], udp.numbers["IP_MULTICAST_TTL"]) == (1, 7)
    assert udp.options.receive_buffer_bytes == 50_000


def test_groups_are_joined_again():
    def prepare():
        four, six = bound(socket.AF_INET), bound(socket.AF_INET6)
        local = socket.inet_aton("127.0.0.1")
        four.setsockopt(socket.IPPROTO_IP, 35, socket.inet_aton("239.7.7.1") + local)
        sender = socket.inet_aton("127.0.0.5")
        four.setsockopt(socket.IPPROTO_IP, 39, socket.inet_aton("239.7.7.2") + local + sender)
        group = socket.inet_pton(socket.AF_INET6, "ff02::7:7")
        lo = struct.pack("I", socket.if_nametoindex("lo"))
        six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + lo)
        return four, six

    with brought_back(prepare) as (record, built):
        four, six = udp_of(record)
        assert built.capture() == record
    assert [(m.group, m.excludes, m.sources) for m in four.memberships] == [
        ("239.7.7.1", True, ()),
        ("239.7.7.2", False, ("127.0.0.5",)),
    ]
    assert [(m.interface, m.group) for m in six.memberships] == [("lo", "ff02::7:7")]


def test_a_datagram_under_way_is_refused():
    def prepare():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(("127.0.0.1", 9))
        sock.send(b"the beginning", socket.MSG_MORE)
        return sock

    with opened_by(prepare) as pid:
        (found,) = look(pid)
    assert "is a UDP socket with a datagram that is not complete" in found


def test_a_port_that_is_taken_is_named():
    from ckpt.resources.files.table import FILES
    from integration.files.processes import FEATURES

    with opened_by(lambda: bound(socket.AF_INET)) as pid:
        record = capture(pid)
        (found,) = [str(finding) for finding in FILES.check_host(record, FEATURES)]
    assert "here (Address already in use)" in found
