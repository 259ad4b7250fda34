"""Packet sockets: what they listen to, on which interface, with which filter.

Packets that were not read are lost, aloud: they are copies of what went by. Between the dump and
the restore nothing is heard.

Kernel: packet(7), include/uapi/linux/if_packet.h; `kernel/packet_diag` for memberships (promiscuous
mode is one) and rings.

Refused before the target is stopped: rings (PACKET_RX_RING, PACKET_TX_RING) and their versions,
fanout groups, filters of eBPF, other network namespaces, a kernel without packet_diag.
"""

import fcntl
import stat
import struct
import termios
from _socket import if_indextoname, if_nametoindex
from collections.abc import Iterator

import attrs

from ckpt.kernel.packet_diag import PacketSocket, read_packet_socket
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening
from ckpt.resources.files import network_space, sockopts
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, duplicate, set_status_flags
from ckpt.resources.files.network_space import beside, borrow_beside, nature_of
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.resources.files.sockopts import (
    Numbers,
    SocketOptions,
    new_socket,
    refuse_unknown,
)
from ckpt.units import Fd

_AF_PACKET = 17
_SOL_PACKET = 263
_ADD_MEMBERSHIP, _COPY_THRESH = 1, 7
_MREQ = struct.Struct("=iHH8s")
"""`struct packet_mreq`."""
_MREQ_MAX = struct.Struct("=iHH32s")
_SHORT_ADDRESS_BYTES = 8

NUMBERS: Numbers = {
    "PACKET_AUXDATA": (_SOL_PACKET, 8),
    "PACKET_ORIGDEV": (_SOL_PACKET, 9),
    "PACKET_RESERVE": (_SOL_PACKET, 12),
    "PACKET_LOSS": (_SOL_PACKET, 14),
    "PACKET_VNET_HDR": (_SOL_PACKET, 15),
    "PACKET_TIMESTAMP": (_SOL_PACKET, 17),
    "PACKET_TX_HAS_OFF": (_SOL_PACKET, 19),
    "PACKET_QDISC_BYPASS": (_SOL_PACKET, 20),
    "PACKET_IGNORE_OUTGOING": (_SOL_PACKET, 23),
    "PACKET_VNET_HDR_SZ": (_SOL_PACKET, 24),
}


@attrs.frozen(slots=True, repr=False)
class LinkMembership:
    """What an interface was asked to let through."""

    interface: str
    count: int
    kind: int
    """PACKET_MR_MULTICAST, PROMISC, ALLMULTI or UNICAST."""
    address: bytes


@attrs.frozen(slots=True, repr=False)
class PacketRecord:
    """A packet socket."""

    kind: int
    """SOCK_RAW, or SOCK_DGRAM: without the header of the link."""
    protocol: int
    """ETH_P_...; 0: takes nothing."""
    interface: str
    """Empty: all."""
    memberships: tuple[LinkMembership, ...]
    copy_threshold: int
    has_unread: bool
    """Packets were waiting to be read."""
    options: SocketOptions
    numbers: dict[str, int]

    def __attrs_post_init__(self) -> None:
        """Refuse unknown options."""
        refuse_unknown(self.numbers, NUMBERS)

    @property
    def path(self) -> str:
        """What a user calls it."""
        return f"packets of {self.interface or 'all interfaces'}, protocol {self.protocol:#06x}"


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return stat.S_ISSOCK(file.status.st_mode) and not file.path_only


def is_for(file: OpenFile, table: FdTable) -> bool:
    """See `Kind.is_for`."""
    return nature_of(file, table).family == _AF_PACKET


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    told = _ask(file, table)
    if told is None:
        return Problem("is a packet socket of which this kernel tells nothing (packet_diag)")
    if told.has_ring or told.version:
        return Problem("is a packet socket with a ring, which is not supported yet")
    if told.has_fanout:
        return Problem("is a packet socket of a fanout group, which is not supported yet")
    with borrow_beside(file, table) as sock:
        return network_space.problem(sock, table) or sockopts.problem(sock)


def _ask(file: OpenFile, table: FdTable) -> PacketSocket | None:
    try:
        with beside(table.pid):
            return read_packet_socket(file.status.st_ino)
    except OSError:
        return None


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> PacketRecord:
    """See `Kind.capture`."""
    told = _ask(file, table)
    with borrow_beside(file, table) as sock:
        interface, protocol = sock.getsockname()[:2]
        (n_bytes,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))
        return PacketRecord(
            kind=sock.type & 0xF,
            protocol=protocol,
            interface=interface,
            memberships=tuple(_iter_memberships(told)) if told else (),
            copy_threshold=told.copy_threshold if told else 0,
            has_unread=n_bytes > 0,
            options=sockopts.capture(sock),
            numbers=sockopts.read_numbers(sock, NUMBERS),
        )


def _iter_memberships(told: PacketSocket) -> Iterator[LinkMembership]:
    for one in told.groups:
        yield LinkMembership(if_indextoname(one.interface), one.count, one.kind, one.address)


def check_host(record: PacketRecord) -> Iterator[Problem]:
    """See `Kind.check_host`."""
    names = {record.interface, *(one.interface for one in record.memberships)} - {""}
    for name in sorted(names):
        try:
            if_nametoindex(name)
        except OSError:
            yield Problem(f"this host has no network interface {name}")


def open_again(record: PacketRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    warn = opening.options.warn
    # Of protocol 0 it hears nothing until its filter is in place.
    with new_socket(_AF_PACKET, record.kind, 0) as sock:
        sockopts.restore(record.options, sock, warn)
        sockopts.set_numbers(record.numbers, sock, NUMBERS, warn)
        if record.copy_threshold:
            sock.setsockopt(_SOL_PACKET, _COPY_THRESH, record.copy_threshold)
        for one in record.memberships:
            for _ in range(one.count):
                sock.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, _membership(one))
        if record.interface or record.protocol:
            sock.bind((record.interface, record.protocol))
        fd = duplicate(sock.fileno())
    if record.has_unread:
        warn(f"{record.path}: those that were not read are lost")
    set_status_flags(fd, flags)
    return fd


def _membership(one: LinkMembership) -> bytes:
    shape = _MREQ if len(one.address) <= _SHORT_ADDRESS_BYTES else _MREQ_MAX
    return shape.pack(if_nametoindex(one.interface), one.kind, len(one.address), one.address)


PACKET = Kind(
    "packet",
    PacketRecord,
    matches=matches,
    is_for=is_for,
    problem=problem,
    capture=capture,
    check_host=check_host,
    open=open_again,
)
