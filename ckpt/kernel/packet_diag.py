"""What sock_diag tells of packet sockets: groups and promiscuity, rings, fanout.

Source: include/uapi/linux/packet_diag.h, net/packet/diag.c.
"""

import struct
from typing import Final

import attrs

from ckpt.kernel.sock_diag import dump, parse_attributes

_AF_PACKET: Final = 17
_REQUEST = struct.Struct("=BBHIIII")
"""`struct packet_diag_req`."""
_MESSAGE = struct.Struct("=BBHIII")
"""`struct packet_diag_msg`."""
_SHOW: Final = 0x1 | 0x2 | 0x4 | 0x8
"""PACKET_SHOW_INFO | MCLIST | RING_CFG | FANOUT."""
_INFO, _MCLIST, _RX_RING, _TX_RING, _FANOUT = 0, 1, 2, 3, 4
_INFO_WORDS = struct.Struct("=6I")
_MEMBERSHIP = struct.Struct("=IIHH32s")
"""`struct packet_diag_mclist`."""


@attrs.frozen(slots=True)
class LinkGroup:
    """A membership of PACKET_ADD_MEMBERSHIP."""

    interface: int
    count: int
    """How often it was asked for."""
    kind: int
    """PACKET_MR_MULTICAST, PROMISC, ALLMULTI or UNICAST."""
    address: bytes


@attrs.frozen(slots=True)
class PacketSocket:
    """What the kernel tells of one packet socket."""

    version: int
    """Of rings: TPACKET_V1 is 0."""
    copy_threshold: int
    groups: tuple[LinkGroup, ...]
    has_ring: bool
    has_fanout: bool


def read_packet_socket(inode: int) -> PacketSocket | None:
    """Return what is told of a packet socket of our network namespace; None if there is none.

    Raises:
        OSError: ENOENT, the kernel has no packet_diag.
    """
    for payload in dump(_REQUEST.pack(_AF_PACKET, 0, 0, 0, _SHOW, 0, 0)):
        if _MESSAGE.unpack_from(payload)[3] == inode:
            return _parse(parse_attributes(payload[_MESSAGE.size :]))
    return None


def _parse(values: dict[int, bytes]) -> PacketSocket:
    _, version, _, threshold, _, _ = _INFO_WORDS.unpack(values[_INFO][: _INFO_WORDS.size])
    listed = _MEMBERSHIP.iter_unpack(values.get(_MCLIST, b""))
    groups = tuple(
        LinkGroup(index, count, kind, address[:length])
        for index, count, kind, length, address in listed
    )
    return PacketSocket(
        version,
        threshold,
        groups,
        has_ring=_RX_RING in values or _TX_RING in values,
        has_fanout=_FANOUT in values,
    )
