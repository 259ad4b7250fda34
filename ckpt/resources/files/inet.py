"""What sockets of IPv4 and IPv6 have in common: addresses, their options, and groups.

Kernel: ip(7), ipv6(7), include/uapi/linux/{in,in6}.h. Which multicast groups a socket has joined,
nobody tells; but the filter of each group that some socket of the host has joined (/proc/net/igmp,
igmp6) can be asked for, and only a member is answered (MCAST_MSFILTER).

Not seen, and so lost: the interface of IP_MULTICAST_IF where it was chosen by number and has no
address, IPV6_PKTINFO set for all packets, anycast addresses, IP_ROUTER_ALERT, IPsec policies.
"""

import struct
from _socket import inet_ntop, inet_pton
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterable, Iterator
from typing import Final

import attrs

from ckpt.kernel.nftables import Flow
from ckpt.resources.files.sockopts import Numbers, Structs, Warn

AF_INET: Final = 2
AF_INET6: Final = 10
SOCK_STREAM: Final = 1
SOCK_DGRAM: Final = 2
EADDRNOTAVAIL = 99
SOCK_RAW: Final = 3
IPPROTO_TCP: Final = 6
IPPROTO_UDP: Final = 17
_IP, _IPV6 = 0, 41

NUMBERS: Numbers = {
    "IP_TOS": (_IP, 1),
    "IP_TTL": (_IP, 2),
    "IP_HDRINCL": (_IP, 3),
    "IP_RECVOPTS": (_IP, 6),
    "IP_RETOPTS": (_IP, 7),
    "IP_PKTINFO": (_IP, 8),
    "IP_MTU_DISCOVER": (_IP, 10),
    "IP_RECVERR": (_IP, 11),
    "IP_RECVTTL": (_IP, 12),
    "IP_RECVTOS": (_IP, 13),
    "IP_FREEBIND": (_IP, 15),
    "IP_PASSSEC": (_IP, 18),
    "IP_TRANSPARENT": (_IP, 19),
    "IP_RECVORIGDSTADDR": (_IP, 20),
    "IP_MINTTL": (_IP, 21),
    "IP_NODEFRAG": (_IP, 22),
    "IP_CHECKSUM": (_IP, 23),
    "IP_BIND_ADDRESS_NO_PORT": (_IP, 24),
    "IP_RECVFRAGSIZE": (_IP, 25),
    "IP_RECVERR_RFC4884": (_IP, 26),
    "IP_UNICAST_IF": (_IP, 50),
    "IP_LOCAL_PORT_RANGE": (_IP, 51),
    # Each of these five of RFC 2292 is another flag than its successor below.
    "IPV6_2292PKTINFO": (_IPV6, 2),
    "IPV6_2292HOPOPTS": (_IPV6, 3),
    "IPV6_2292DSTOPTS": (_IPV6, 4),
    "IPV6_2292RTHDR": (_IPV6, 5),
    "IPV6_2292HOPLIMIT": (_IPV6, 8),
    "IPV6_CHECKSUM": (_IPV6, 7),
    "IPV6_FLOWINFO": (_IPV6, 11),
    "IPV6_UNICAST_HOPS": (_IPV6, 16),
    "IPV6_MTU_DISCOVER": (_IPV6, 23),
    "IPV6_RECVERR": (_IPV6, 25),
    "IPV6_V6ONLY": (_IPV6, 26),
    "IPV6_ROUTER_ALERT_ISOLATE": (_IPV6, 30),
    "IPV6_RECVERR_RFC4884": (_IPV6, 31),
    "IPV6_FLOWINFO_SEND": (_IPV6, 33),
    "IPV6_HDRINCL": (_IPV6, 36),
    "IPV6_RECVPKTINFO": (_IPV6, 49),
    "IPV6_RECVHOPLIMIT": (_IPV6, 51),
    "IPV6_RECVHOPOPTS": (_IPV6, 53),
    "IPV6_RECVRTHDR": (_IPV6, 56),
    "IPV6_RECVDSTOPTS": (_IPV6, 58),
    "IPV6_RECVPATHMTU": (_IPV6, 60),
    "IPV6_DONTFRAG": (_IPV6, 62),
    "IPV6_RECVTCLASS": (_IPV6, 66),
    "IPV6_TCLASS": (_IPV6, 67),
    "IPV6_AUTOFLOWLABEL": (_IPV6, 70),
    "IPV6_ADDR_PREFERENCES": (_IPV6, 72),
    "IPV6_MINHOPCOUNT": (_IPV6, 73),
    "IPV6_RECVORIGDSTADDR": (_IPV6, 74),
    "IPV6_TRANSPARENT": (_IPV6, 75),
    "IPV6_UNICAST_IF": (_IPV6, 76),
    "IPV6_RECVFRAGSIZE": (_IPV6, 77),
    "IPV6_FREEBIND": (_IPV6, 78),
}
"""Options with an int for a value. A socket of the other family neither tells nor takes them."""

MULTICAST_NUMBERS: Numbers = {
    "IP_MULTICAST_TTL": (_IP, 33),
    "IP_MULTICAST_LOOP": (_IP, 34),
    "IP_MULTICAST_ALL": (_IP, 49),
    "IPV6_MULTICAST_IF": (_IPV6, 17),
    "IPV6_MULTICAST_HOPS": (_IPV6, 18),
    "IPV6_MULTICAST_LOOP": (_IPV6, 19),
    "IPV6_MULTICAST_ALL": (_IPV6, 29),
}
"""Those that stream sockets do not take (but inherit from the packet that made them)."""

STRUCTS: Structs = {
    "IP_OPTIONS": (_IP, 4, 40),
    "IPV6_HOPOPTS": (_IPV6, 54, 1024),
    "IPV6_RTHDRDSTOPTS": (_IPV6, 55, 1024),
    "IPV6_RTHDR": (_IPV6, 57, 1024),
    "IPV6_DSTOPTS": (_IPV6, 59, 1024),
}

MULTICAST_STRUCTS: Structs = {"IP_MULTICAST_IF": (_IP, 32, 4)}


@attrs.frozen(slots=True)
class InetAddress:
    """An address and a port, as bind(2) and connect(2) take them."""

    family: int
    """AF_INET or AF_INET6."""
    host: str
    port: int
    """0: none. Of a raw socket, it has no meaning."""
    flow_info: int = 0
    scope_id: int = 0

    def __attrs_post_init__(self) -> None:
        """Refuse what is no address."""
        if self.family not in (AF_INET, AF_INET6) or not 0 <= self.port < 2**16:
            raise ValueError(f"family {self.family}, port {self.port} is no internet address")
        try:
            inet_pton(self.family, self.host)
        except OSError as error:
            raise ValueError(f"{self.host!r} is no address") from error

    @property
    def where(self) -> str:
        """Address and port, for a user."""
        host = f"[{self.host}]" if self.family == AF_INET6 else self.host
        return f"{host}:{self.port}"

    @property
    def sockaddr(self) -> tuple[object, ...]:
        """What bind(2) and connect(2) take."""
        if self.family == AF_INET:
            return self.host, self.port
        return self.host, self.port, self.flow_info, self.scope_id

    @property
    def is_any(self) -> bool:
        """Tell whether it is of no interface in particular."""
        return not self.packed.strip(b"\0")

    @property
    def packed(self) -> bytes:
        """4 or 16 bytes."""
        return inet_pton(self.family, self.host)


def address_of(family: int, name: Iterable[object]) -> InetAddress:
    """Return what getsockname(2), getpeername(2) or recvfrom(2) told."""
    host, port, flow_info, scope_id = (*name, 0, 0)[:4]
    # A link-local address comes with the name of its interface.
    bare = str(host).partition("%")[0]
    return InetAddress(family, bare, int(str(port)), int(str(flow_info)), int(str(scope_id)))


def peer_of(sock: Socket) -> InetAddress | None:
    """Return whom a socket is connected to; None for nobody."""
    try:
        return address_of(sock.family, sock.getpeername())
    except OSError:
        return None


_MAPPED = bytes(10) + b"\xff\xff"
"""How IPv6 writes an IPv4 address (RFC 4291)."""


def flow_between(local: InetAddress, peer: InetAddress) -> Flow:
    """Return what packets of a connection look like; one of IPv4 may have sockets of IPv6."""
    here, there, family = local.packed, peer.packed, local.family
    if family == AF_INET6 and here.startswith(_MAPPED):
        here, there, family = here[12:], there[12:], AF_INET
    return Flow(family, here, local.port, there, peer.port)


@attrs.frozen(slots=True)
class Membership:
    """A multicast group that a socket has joined on an interface."""

    interface: str
    group: str
    excludes: bool
    """Takes all senders but `sources`; else only those."""
    sources: tuple[str, ...]

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return AF_INET6 if ":" in self.group else AF_INET


_MCAST_JOIN_GROUP, _MCAST_MSFILTER = 42, 48
_EXCLUDE, _INCLUDE = 0, 1
_STORAGE_BYTES = 128
_GROUP_REQ = struct.Struct(f"=I4x{_STORAGE_BYTES}s")
"""`struct group_req`."""
_GROUP_FILTER = struct.Struct(f"=I4x{_STORAGE_BYTES}sII")
"""`struct group_filter` up to its sources."""
_MAX_SOURCES = 64
"""As many as this are asked for; net.ipv4.igmp_max_msf is 10 unless it was raised."""


def read_memberships(sock: Socket) -> tuple[Membership, ...]:
    """Return the groups that a socket of ours has joined, by interface and group."""
    groups = {AF_INET: _iter_groups4, AF_INET6: _iter_groups6}
    found: list[Membership] = []
    for family in (AF_INET,) if sock.family == AF_INET else (AF_INET, AF_INET6):
        for interface, group in dict.fromkeys(groups[family]()):
            membership = _ask_membership(sock, family, interface, group)
            if membership is not None:
                found.append(membership)
    return tuple(sorted(found, key=lambda one: (one.interface, one.group)))


def _ask_membership(sock: Socket, family: int, interface: str, group: bytes) -> Membership | None:
    from _socket import if_nametoindex

    level = _IP if family == AF_INET else _IPV6
    room = _MAX_SOURCES
    try:
        asked = _GROUP_FILTER.pack(
            if_nametoindex(interface), _storage(family, group), _INCLUDE, room
        )
        raw = _get_with(sock, level, _MCAST_MSFILTER, asked + bytes(room * _STORAGE_BYTES))
    except OSError:
        return None
    _, _, mode, n_sources = _GROUP_FILTER.unpack_from(raw)
    sources = raw[_GROUP_FILTER.size :]
    listed = [sources[n * _STORAGE_BYTES :] for n in range(min(n_sources, room))]
    names = tuple(_text_of(family, one) for one in listed)
    return Membership(interface, inet_ntop(family, group), mode == _EXCLUDE, names)


def _get_with(sock: Socket, level: int, option: int, value: bytes) -> bytes:
    """getsockopt(2) for an option that reads its buffer first."""
    from array import array

    from ckpt.kernel.arch import NR
    from ckpt.kernel.libc import syscall, writable_address

    buffer, size = bytearray(value), array("i", [len(value)])
    address, _ = writable_address(buffer)
    syscall(NR.getsockopt, sock.fileno(), level, option, address, size.buffer_info()[0])
    return bytes(buffer)


def _storage(family: int, address: bytes) -> bytes:
    """`struct sockaddr_storage` of an address without a port."""
    head = struct.pack("=H2x", family) + (b"" if family == AF_INET else bytes(4))
    return (head + address).ljust(_STORAGE_BYTES, b"\0")


def _text_of(family: int, storage: bytes) -> str:
    return inet_ntop(family, storage[4:8] if family == AF_INET else storage[8:24])


def _iter_groups4() -> Iterator[tuple[str, bytes]]:
    """Yield interface and group from /proc/net/igmp (net/ipv4/igmp.c)."""
    interface = ""
    for line in _lines("/proc/thread-self/net/igmp"):
        words = line.split()
        if not line[0].isspace():
            interface = words[1].rstrip(":")
        else:
            # In the order of bytes of this machine, as one number.
            yield interface, struct.pack("=I", int(words[0], 16))


def _iter_groups6() -> Iterator[tuple[str, bytes]]:
    """Yield interface and group from /proc/net/igmp6."""
    for line in _lines("/proc/thread-self/net/igmp6", skip=0):
        words = line.split()
        yield words[1], bytes.fromhex(words[2])


def _lines(path: str, *, skip: int = 1) -> list[str]:
    try:
        with open(path) as file:
            return [line for line in file.read().splitlines() if line][skip:]
    except OSError:
        return []


def join_groups(memberships: Iterable[Membership], sock: Socket, warn: Warn) -> None:
    """Join the groups again; one that cannot be joined here is told."""
    for one in memberships:
        try:
            _join(one, sock)
        except OSError as error:
            warn(
                f"the multicast group {one.group} cannot be joined on interface {one.interface}"
                f" ({error.strerror})"
            )


def _join(one: Membership, sock: Socket) -> None:
    from _socket import if_nametoindex

    level = _IP if one.family == AF_INET else _IPV6
    index, group = if_nametoindex(one.interface), inet_pton(one.family, one.group)
    storage = _storage(one.family, group)
    sock.setsockopt(level, _MCAST_JOIN_GROUP, _GROUP_REQ.pack(index, storage))
    if one.sources or not one.excludes:
        mode = _EXCLUDE if one.excludes else _INCLUDE
        listed = b"".join(_storage(one.family, inet_pton(one.family, s)) for s in one.sources)
        head = _GROUP_FILTER.pack(index, storage, mode, len(one.sources))
        sock.setsockopt(level, _MCAST_MSFILTER, head + listed)
