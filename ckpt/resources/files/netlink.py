"""Netlink sockets: their port, groups, options and filters.

    port      chosen by bind(2), or the process's pid at its first message; taken again as it was
    groups    NETLINK_LIST_MEMBERSHIPS, joined one by one
    peer      of connect(2); the kernel (port 0) unless somebody else was chosen

Kernel: netlink(7), include/uapi/linux/netlink.h; /proc/net/netfilter/nfnetlink_{queue,log} for what
the firewall sends to a port.

Refused before the target is stopped: messages that were not read, protocols in which the kernel
remembers more of a socket than this (audit, connector, ...), queues and logs of the firewall,
filters of eBPF, other network namespaces. Not seen, and so lost: tables of nf_tables that belong to
the socket, a pending error (ENOBUFS).
"""

import stat
import struct
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterator

import attrs

from ckpt.process.remote import Reply
from ckpt.resources.base import Opening
from ckpt.resources.files import network_space, sockopts
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, duplicate, set_status_flags
from ckpt.resources.files.network_space import borrow_beside, nature_of
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.resources.files.sockopts import (
    Numbers,
    SocketOptions,
    new_socket,
    refuse_unknown,
)
from ckpt.units import Fd

_AF_NETLINK = 16
_SOL_NETLINK = 270
_ADD_MEMBERSHIP, _LIST_MEMBERSHIPS = 1, 9
_GROUP_BYTES = 512
_NETFILTER = 12
_KNOWN = {
    0: "route",
    4: "sock_diag",
    6: "xfrm",
    _NETFILTER: "netfilter",
    15: "uevent",
    16: "generic",
}
_OTHERS = {
    1: "unused",
    2: "usersock",
    7: "selinux",
    8: "iscsi",
    9: "audit",
    10: "fib",
    11: "connector",
}

NUMBERS: Numbers = {
    "NETLINK_PKTINFO": (_SOL_NETLINK, 3),
    "NETLINK_BROADCAST_ERROR": (_SOL_NETLINK, 4),
    "NETLINK_NO_ENOBUFS": (_SOL_NETLINK, 5),
    "NETLINK_LISTEN_ALL_NSID": (_SOL_NETLINK, 8),
    "NETLINK_CAP_ACK": (_SOL_NETLINK, 10),
    "NETLINK_EXT_ACK": (_SOL_NETLINK, 11),
    "NETLINK_GET_STRICT_CHK": (_SOL_NETLINK, 12),
}


@attrs.frozen(slots=True, repr=False)
class NetlinkRecord:
    """A netlink socket."""

    kind: int
    """SOCK_RAW or SOCK_DGRAM."""
    protocol: int
    port: int
    """0 if it has none yet."""
    groups: tuple[int, ...]
    """By number, the first is 1."""
    peer_port: int
    peer_groups: int
    """Bits, as connect(2) takes them."""
    options: SocketOptions
    numbers: dict[str, int]

    def __attrs_post_init__(self) -> None:
        """Refuse what is no such socket."""
        if self.protocol not in _KNOWN:
            raise ValueError(f"netlink protocol {self.protocol} is not known")
        refuse_unknown(self.numbers, NUMBERS)

    @property
    def path(self) -> str:
        """What a user calls it."""
        return f"netlink {_KNOWN[self.protocol]}, port {self.port}"


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return stat.S_ISSOCK(file.status.st_mode) and not file.path_only


def is_for(file: OpenFile, table: FdTable) -> bool:
    """See `Kind.is_for`."""
    return nature_of(file, table).family == _AF_NETLINK


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    with borrow_beside(file, table) as sock:
        if sock.proto not in _KNOWN:
            name = _OTHERS.get(sock.proto, f"protocol {sock.proto}")
            return Problem(f"is a netlink socket ({name}), which is not supported yet")
        if _has_message(sock):
            return Problem("is a netlink socket with messages that were not read", "try again")
        port = sock.getsockname()[0]
        if sock.proto == _NETFILTER and port in set(_iter_firewall_ports()):
            return Problem(
                "is a netlink socket to which the firewall sends (nfqueue, nflog), which is not"
                " supported yet"
            )
        return network_space.problem(sock, table) or sockopts.problem(sock)


def _has_message(sock: Socket) -> bool:
    """Ask without reading: that would take a pending error away."""
    import select

    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(dict(poll.poll(0)).get(sock.fileno(), 0) & select.POLLIN)


def _iter_firewall_ports() -> Iterator[int]:
    """Yield the ports that the firewall sends to: the second column of both lists."""
    for name in ("nfnetlink_queue", "nfnetlink_log"):
        try:
            with open(f"/proc/thread-self/net/netfilter/{name}") as file:
                lines = file.read().splitlines()
        except OSError:
            continue
        yield from (int(line.split()[1]) for line in lines if line)


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> NetlinkRecord:
    """See `Kind.capture`."""
    with borrow_beside(file, table) as sock:
        port, _ = sock.getsockname()
        peer_port, peer_groups = sock.getpeername()
        return NetlinkRecord(
            kind=sock.type & 0xF,
            protocol=sock.proto,
            port=port,
            groups=_read_groups(sock),
            peer_port=peer_port,
            peer_groups=peer_groups,
            options=sockopts.capture(sock),
            numbers=sockopts.read_numbers(sock, NUMBERS),
        )


def _read_groups(sock: Socket) -> tuple[int, ...]:
    raw = sock.getsockopt(_SOL_NETLINK, _LIST_MEMBERSHIPS, _GROUP_BYTES)
    words = struct.unpack(f"={len(raw) // 4}I", raw)
    return tuple(
        32 * nth + bit + 1 for nth, word in enumerate(words) for bit in range(32) if word >> bit & 1
    )


def check_host(record: NetlinkRecord) -> Iterator[Problem]:
    """See `Kind.check_host`: try to have the port, and let go again."""
    try:
        with new_socket(_AF_NETLINK, record.kind, record.protocol) as sock:
            if record.port:
                sock.bind((record.port, 0))
    except OSError as error:
        yield Problem(f"cannot have its port here ({error.strerror})")


def open_again(record: NetlinkRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    warn = opening.options.warn
    with new_socket(_AF_NETLINK, record.kind, record.protocol) as sock:
        sockopts.restore(record.options, sock, warn)
        sockopts.set_numbers(record.numbers, sock, NUMBERS, warn)
        if record.port:
            sock.bind((record.port, 0))
        for group in record.groups:
            try:
                sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
            except OSError as error:
                warn(f"{record.path}: group {group} cannot be joined here ({error.strerror})")
        if record.peer_port or record.peer_groups:
            sock.connect((record.peer_port, record.peer_groups))
        fd = duplicate(sock.fileno())
    set_status_flags(fd, flags)
    return fd


NETLINK = Kind(
    "netlink",
    NetlinkRecord,
    matches=matches,
    is_for=is_for,
    problem=problem,
    capture=capture,
    check_host=check_host,
    open=open_again,
)
