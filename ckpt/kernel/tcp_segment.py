"""One hand-made TCP segment, as if the peer had sent it: how a FIN gets into a repaired socket.

Repair sets numbers and queues, but not that the peer has closed its side, nor that it has
acknowledged ours. So the restored socket is told by a segment of its peer, which a raw socket of
ours sends; over the loopback, whatever the addresses are, since the destination is ours.

Source: RFC 9293 (header, checksum), raw(7), ipv6(7); SO_MARK lets it through `nftables`.
"""

import contextlib
import struct
from _socket import inet_ntop
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterator
from typing import Final

from ckpt.kernel.nftables import MARK, Flow

_AF_INET, _AF_INET6 = 2, 10
_SOCK_RAW, _SOCK_CLOEXEC = 3, 0o2000000
_IPPROTO_TCP, _IPPROTO_RAW = 6, 255
_SOL_SOCKET, _SO_MARK = 1, 36
_TCP = struct.Struct("!HHIIBBHHH")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_HEADER_WORDS = 5
_TTL = 64

FIN: Final = 0x01
ACK: Final = 0x10


def send_as_peer(flow: Flow, flags: int, seq: int, acknowledged: int, *, scope_id: int = 0) -> None:
    """Send a bare segment from the peer of a connection to our side of it.

    State: the socket exists; when this returns it has taken the segment.

    Args:
        flow: addresses and ports.
        flags: FIN, ACK.
        seq: the number of the segment, the next that our side waits for.
        acknowledged: the number up to which the peer has everything.
        scope_id: of our address, if that is a link-local one.

    Raises:
        OSError: no CAP_NET_RAW, or no way to the address.
    """
    segment = _segment(flow, flags, seq, acknowledged)
    if flow.family == _AF_INET:
        size = _IPV4.size + len(segment)
        packet = _IPV4.pack(0x45, 0, size, 0, 0, _TTL, _IPPROTO_TCP, 0, flow.peer, flow.local)
    else:
        packet = _IPV6.pack(6 << 28, len(segment), _IPPROTO_TCP, _TTL, flow.peer, flow.local)
    with _raw_socket(flow.family) as sock:
        sock.sendto(packet + segment, _destination(flow, scope_id))


def _destination(flow: Flow, scope_id: int) -> tuple[object, ...]:
    text = inet_ntop(flow.family, flow.local)
    return (text, 0) if flow.family == _AF_INET else (text, 0, 0, scope_id)


@contextlib.contextmanager
def _raw_socket(family: int) -> Iterator[Socket]:
    """A raw socket of IPPROTO_RAW takes the header of IP from us."""
    sock = Socket(family, _SOCK_RAW | _SOCK_CLOEXEC, _IPPROTO_RAW)
    try:
        sock.setsockopt(_SOL_SOCKET, _SO_MARK, MARK)
        yield sock
    finally:
        sock.close()


def _segment(flow: Flow, flags: int, seq: int, acknowledged: int) -> bytes:
    ports = (flow.peer_port, flow.local_port)
    numbers = (seq & 0xFFFF_FFFF, acknowledged & 0xFFFF_FFFF)
    bare = _TCP.pack(*ports, *numbers, _HEADER_WORDS << 4, flags, 0xFFFF, 0, 0)
    summed = flow.peer + flow.local + struct.pack("!II", len(bare), _IPPROTO_TCP) + bare
    return bare[:16] + struct.pack("!H", checksum(summed)) + bare[18:]


def checksum(data: bytes) -> int:
    """Return the checksum of the internet protocols (RFC 1071) over an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
