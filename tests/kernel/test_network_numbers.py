"""The promise: numbers and sums of the network are those of the headers and of the RFCs."""

import struct

import pytest

from ckpt.kernel import nftables, tcp_repair
from ckpt.kernel.nftables import Flow
from ckpt.kernel.raw_ip import checksum, sum_with
from ckpt.resources.files import inet, netlink, packet, tcp_record, udp
from tests.kernel.c_headers import read_numbers, run_c

LEVELS = {"IP": 0, "IPV6": 41, "TCP": 6, "UDP": 17, "UDPLITE": 136, "PACKET": 263, "NETLINK": 270}


def test_numbers_of_repair():
    ours = {
        name: value
        for name, value in vars(tcp_repair).items()
        if name.startswith(("TCP_", "TCPI_OPT_")) and isinstance(value, int)
    }
    # States and queues are enumerators of C.
    prints = "".join(f'printf("%d ", (int){name});' for name in ours if not name.endswith("_QUEUE"))
    prints += 'printf("%d %d %d", TCP_NO_QUEUE, TCP_RECV_QUEUE, TCP_SEND_QUEUE);'
    headers = ["linux/tcp.h"]
    states = "enum { TCP_ESTABLISHED = 1, TCP_SYN_SENT, TCP_SYN_RECV, TCP_FIN_WAIT1, TCP_FIN_WAIT2,"
    states += "TCP_TIME_WAIT, TCP_CLOSE, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_LISTEN, TCP_CLOSING };"
    numbers = [int(word) for word in run_c(headers, states + prints).split()]
    named = [value for name, value in ours.items() if not name.endswith("_QUEUE")]
    assert numbers[:-3] == named
    assert numbers[-3:] == [ours["TCP_NO_QUEUE"], ours["TCP_RECV_QUEUE"], ours["TCP_SEND_QUEUE"]]


@pytest.mark.parametrize(
    ("table", "headers"),
    [
        (inet.NUMBERS, ["linux/in.h", "linux/in6.h"]),
        (inet.MULTICAST_NUMBERS, ["linux/in.h", "linux/in6.h"]),
        (tcp_record.NUMBERS, ["linux/in.h", "linux/in6.h", "linux/tcp.h"]),
        (udp.NUMBERS, ["linux/in.h", "linux/in6.h", "linux/udp.h"]),
        (netlink.NUMBERS, ["linux/netlink.h"]),
        (packet.NUMBERS, ["linux/if_packet.h"]),
    ],
)
def test_options_have_the_numbers_and_levels_of_the_headers(table, headers):
    known = read_numbers(headers, list(table))
    assert known
    assert {name: number for name, (_, number) in table.items() if name in known} == known
    assert all(level == LEVELS[name.partition("_")[0]] for name, (level, _) in table.items())


def test_checksum_of_the_rfc():
    # RFC 1071, section 3: the sum is ddf2.
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2


def test_a_packet_with_its_sum_sums_up_to_nothing():
    source, destination = bytes([127, 0, 0, 1]), bytes([127, 0, 0, 2])
    bare = struct.pack("!HHHH", 7, 9, 11, 0) + b"odd"
    total = sum_with(17, source, destination, bare)
    whole = bare[:6] + struct.pack("!H", total) + bare[8:]
    assert sum_with(17, source, destination, whole) == 0


def test_a_key_is_laid_out_as_the_registers_are_loaded():
    flow = Flow(2, bytes([10, 0, 0, 1]), 80, bytes([10, 0, 0, 2]), 4660)
    assert flow.key == bytes.fromhex("0a000001 0a000002 00500000 12340000".replace(" ", ""))
    six = Flow(10, bytes(range(16)), 1, bytes(range(16, 32)), 2)
    assert len(six.key) == 2 * 16 + 2 * 4


def test_numbers_of_nf_tables():
    names = {
        "NFT_MSG_NEWTABLE": nftables._NEWTABLE,
        "NFT_MSG_GETTABLE": nftables._GETTABLE,
        "NFT_MSG_DELTABLE": nftables._DELTABLE,
        "NFT_MSG_NEWCHAIN": nftables._NEWCHAIN,
        "NFT_MSG_NEWRULE": nftables._NEWRULE,
        "NFT_MSG_NEWSET": nftables._NEWSET,
        "NFT_MSG_NEWSETELEM": nftables._NEWSETELEM,
        "NFT_MSG_DELSETELEM": nftables._DELSETELEM,
        "NFT_META_MARK": nftables._META_MARK,
        "NFT_META_NFPROTO": nftables._META_NFPROTO,
        "NFT_META_L4PROTO": nftables._META_L4PROTO,
        "NFT_TABLE_F_OWNER": nftables._TABLE_F_OWNER,
        "NFT_REG32_00": nftables._REG32_00,
        "NFPROTO_INET": nftables._NFPROTO_INET,
        "NF_INET_LOCAL_IN": nftables._LOCAL_IN,
        "NF_INET_LOCAL_OUT": nftables._LOCAL_OUT,
    }
    headers = ["linux/netfilter.h", "linux/netfilter/nf_tables.h"]
    prints = "".join(f'printf("%d ", (int){name});' for name in names)
    assert [int(word) for word in run_c(headers, prints).split()] == list(names.values())
