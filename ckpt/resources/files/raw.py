"""Raw sockets of IPv4 and IPv6: protocol, addresses, options, filters, groups.

Packets that were not read are lost, aloud: nothing that comes raw is promised to arrive.

Kernel: raw(7), ipv6(7), icmp(7) ICMP_FILTER; /proc/net/raw and raw6 for whom it is connected to,
which getpeername(2) tells only of sockets with ports.

Refused before the target is stopped: filters of eBPF, other network namespaces. Not seen, and so
lost: multicast routing (MRT_INIT), IP_ROUTER_ALERT.
"""

import fcntl
import stat
import struct
import termios
from _socket import inet_ntop
from collections.abc import Iterator

import attrs

from ckpt.process.remote import Reply
from ckpt.resources.base import Opening
from ckpt.resources.files import inet, network_space, sockopts
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.inet import InetAddress, Membership, address_of
from ckpt.resources.files.kind import Kind, duplicate, set_status_flags
from ckpt.resources.files.network_space import borrow_beside, nature_of
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.resources.files.sockopts import (
    Numbers,
    SocketOptions,
    Structs,
    new_socket,
    refuse_unknown,
)
from ckpt.units import Fd

_SOL_RAW, _IPPROTO_ICMPV6 = 255, 58
_LISTS = {inet.AF_INET: "/proc/thread-self/net/raw", inet.AF_INET6: "/proc/thread-self/net/raw6"}
_REMOTE, _INODE = 2, 9
"""Columns of these lists."""

NUMBERS: Numbers = (
    dict(inet.NUMBERS) | dict(inet.MULTICAST_NUMBERS) | {"RAW_CHECKSUM": (_SOL_RAW, 7)}
)
STRUCTS: Structs = (
    dict(inet.STRUCTS)
    | dict(inet.MULTICAST_STRUCTS)
    | {"ICMP_FILTER": (_SOL_RAW, 1, 4), "ICMP6_FILTER": (_IPPROTO_ICMPV6, 1, 32)}
)


@attrs.frozen(slots=True, repr=False)
class RawRecord:
    """A raw socket."""

    protocol: int
    local: InetAddress
    """Its port has no meaning."""
    peer: InetAddress | None
    has_unread: bool
    """Packets were waiting to be read."""
    memberships: tuple[Membership, ...]
    options: SocketOptions
    numbers: dict[str, int]
    structs: dict[str, bytes]

    def __attrs_post_init__(self) -> None:
        """Refuse unknown options."""
        refuse_unknown(self.numbers, NUMBERS)
        refuse_unknown(self.structs, STRUCTS)

    @property
    def path(self) -> str:
        """What a user calls it."""
        return f"raw socket of protocol {self.protocol} at {self.local.host}"


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return stat.S_ISSOCK(file.status.st_mode) and not file.path_only


def is_for(file: OpenFile, table: FdTable) -> bool:
    """See `Kind.is_for`."""
    nature = nature_of(file, table)
    return nature.family in _LISTS and nature.kind == inet.SOCK_RAW


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    with borrow_beside(file, table) as sock:
        return network_space.problem(sock, table) or sockopts.problem(sock)


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> RawRecord:
    """See `Kind.capture`."""
    with borrow_beside(file, table) as sock:
        (n_bytes,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))
        return RawRecord(
            protocol=sock.proto,
            local=address_of(sock.family, sock.getsockname()),
            peer=_read_peer(sock.family, file.status.st_ino),
            has_unread=n_bytes > 0,
            memberships=inet.read_memberships(sock),
            options=sockopts.capture(sock),
            numbers=sockopts.read_numbers(sock, NUMBERS),
            structs=sockopts.read_structs(sock, STRUCTS),
        )


def _read_peer(family: int, inode: int) -> InetAddress | None:
    """Return whom a raw socket is connected to, from the list of the kernel."""
    with open(_LISTS[family]) as file:
        lines = file.read().splitlines()[1:]
    for line in lines:
        words = line.split()
        if int(words[_INODE]) == inode:
            return _parse_peer(family, words[_REMOTE])
    return None


def _parse_peer(family: int, text: str) -> InetAddress | None:
    """Parse an address of these lists: words of 32 bits in the order of this machine."""
    words, _, port = text.partition(":")
    numbers = [int(words[at : at + 8], 16) for at in range(0, len(words), 8)]
    packed = struct.pack(f"={len(numbers)}I", *numbers)
    if not packed.strip(b"\0"):
        return None
    return InetAddress(family, inet_ntop(family, packed), int(port, 16))


def check_host(record: RawRecord) -> Iterator[Problem]:
    """See `Kind.check_host`."""
    try:
        with new_socket(record.local.family, inet.SOCK_RAW, record.protocol) as sock:
            if not record.local.is_any:
                sock.bind(record.local.sockaddr)
    except OSError as error:
        yield Problem(
            f"cannot be had at {record.local.host} here ({error.strerror})",
            wants_address=error.errno == inet.EADDRNOTAVAIL,
        )


def open_again(record: RawRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    warn = opening.options.warn
    with new_socket(record.local.family, inet.SOCK_RAW, record.protocol) as sock:
        sockopts.restore(record.options, sock, warn)
        sockopts.set_structs(record.structs, sock, STRUCTS, warn)
        sockopts.set_numbers(record.numbers, sock, NUMBERS, warn)
        inet.join_groups(record.memberships, sock, warn)
        if not record.local.is_any:
            sock.bind(record.local.sockaddr)
        if record.peer is not None:
            sock.connect(record.peer.sockaddr)
        fd = duplicate(sock.fileno())
    if record.has_unread:
        warn(f"{record.path}: packets that were not read are lost")
    set_status_flags(fd, flags)
    return fd


RAW = Kind(
    "raw",
    RawRecord,
    matches=matches,
    is_for=is_for,
    problem=problem,
    capture=capture,
    check_host=check_host,
    open=open_again,
)
