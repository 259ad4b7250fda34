"""Packets of IP made by hand, in the name of somebody else: to sockets of our own host only.

A raw socket of IPPROTO_RAW takes the header from us. Since the destination is ours, the packet goes
over the loopback, whatever address it says it comes from. It has our mark (SO_MARK), which lets it
through the tables of `nftables`.

Source: raw(7), ipv6(7), RFC 791, RFC 8200; CAP_NET_RAW, and CAP_NET_ADMIN for the mark.
"""

import struct
from _socket import inet_ntop
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load

from ckpt.kernel.nftables import MARK

_AF_INET = 2
_SOCK_RAW, _SOCK_CLOEXEC = 3, 0o2000000
_IPPROTO_RAW = 255
_SOL_SOCKET, _SO_MARK, _SO_SNDBUFFORCE = 1, 36, 32
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_TTL = 64
_ROOM_BYTES = 1 << 19


def send_packet(
    family: int, protocol: int, source: bytes, destination: bytes, payload: bytes, scope_id: int = 0
) -> None:
    """Send one packet; when this returns, the socket that it is for has it, if there is one.

    Args:
        family: AF_INET or AF_INET6.
        protocol: of the payload.
        source: 4 or 16 bytes, any address.
        destination: an address of this host.
        payload: its header and data, the checksum included.
        scope_id: of a destination that is link-local.

    Raises:
        OSError: EPERM, no capability; ENETUNREACH, EMSGSIZE, ...
    """
    if family == _AF_INET:
        size = _IPV4.size + len(payload)
        head = _IPV4.pack(0x45, 0, size, 0, 0, _TTL, protocol, 0, source, destination)
        to: tuple[object, ...] = (inet_ntop(family, destination), 0)
    else:
        head = _IPV6.pack(6 << 28, len(payload), protocol, _TTL, source, destination)
        to = (inet_ntop(family, destination), 0, 0, scope_id)
    sock = Socket(family, _SOCK_RAW | _SOCK_CLOEXEC, _IPPROTO_RAW)
    try:
        sock.setsockopt(_SOL_SOCKET, _SO_MARK, MARK)
        sock.setsockopt(_SOL_SOCKET, _SO_SNDBUFFORCE, _ROOM_BYTES)
        sock.sendto(head + payload, to)
    finally:
        sock.close()


def sum_with(protocol: int, source: bytes, destination: bytes, payload: bytes) -> int:
    """Return the checksum of a payload whose own checksum is 0, with addresses and length."""
    head = source + destination + struct.pack("!II", len(payload), protocol)
    return checksum(head + payload)


def checksum(data: bytes) -> int:
    """Return the checksum of the internet protocols (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
