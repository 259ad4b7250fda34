"""UDP sockets (and UDP-Lite, and sockets of ping): bound, connected, with their queued datagrams.

Queued datagrams are read without being taken out, each with its sender, by peeking one behind the
other (SO_PEEK_OFF). They come back as packets of their senders, which a raw socket of ours sends
to the restored one before anything else can: over the loopback, whatever their senders are. The
order is kept; what else was told of them (time stamps, interface, options) is not. One that does
not arrive (a packet filter, a group of sockets at one port) is lost aloud: UDP promises no more.

Kernel: udp(7), udplite(7), icmp(7), socket(7) SO_PEEK_OFF, raw(7).

Refused before the target is stopped: a datagram under way (MSG_MORE, UDP_CORK), filters of eBPF,
other network namespaces, datagrams beside an error. Not kept: an error without datagrams, queued
datagrams of sockets of ping, the error queue; that a socket was shut down for writing alone. An
empty datagram is seen once: the kernel does not show it to a second dump.
"""

import contextlib
import fcntl
import select
import stat
import struct
import termios
import time
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterator

import attrs

from ckpt.kernel.udp_packet import send_datagram
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening
from ckpt.resources.files import inet, network_space, sockopts
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.inet import (
    InetAddress,
    Membership,
    address_of,
    flow_between,
    peer_of,
)
from ckpt.resources.files.kind import Kind, duplicate, set_status_flags
from ckpt.resources.files.network_space import borrow_beside, nature_of
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.resources.files.sockopts import (
    Numbers,
    SocketOptions,
    Warn,
    new_socket,
    refuse_unknown,
)
from ckpt.units import Fd

_UDP, _UDPLITE, _ICMP, _ICMPV6 = 17, 136, 1, 58
_PROTOCOLS = frozenset({_UDP, _UDPLITE, _ICMP, _ICMPV6})
_SO_PEEK_OFF, _SO_RCVBUFFORCE = 42, 33
_MSG_PEEK, _MSG_DONTWAIT, _MSG_TRUNC = 2, 0x40, 0x20
_LARGEST_BYTES = 1 << 16
_MAX_DATAGRAMS = 1 << 16
_UNSAFE_TO_PEEK = select.POLLIN | select.POLLERR
_READING, _BOTH = 1, 3
"""What was shut down; one more than shutdown(2) takes."""
_TRIES = 20
_PAUSE_S = 0.001

NUMBERS: Numbers = (
    dict(inet.NUMBERS)
    | dict(inet.MULTICAST_NUMBERS)
    | {
        "UDP_CORK": (_UDP, 1),
        "UDPLITE_SEND_CSCOV": (_UDPLITE, 10),
        "UDPLITE_RECV_CSCOV": (_UDPLITE, 11),
        "UDP_ENCAP": (_UDP, 100),
        "UDP_NO_CHECK6_TX": (_UDP, 101),
        "UDP_NO_CHECK6_RX": (_UDP, 102),
        "UDP_SEGMENT": (_UDP, 103),
        "UDP_GRO": (_UDP, 104),
    }
)
STRUCTS = dict(inet.STRUCTS) | dict(inet.MULTICAST_STRUCTS)


@attrs.frozen(slots=True, repr=False)
class Datagram:
    """One that was not read."""

    sender: InetAddress
    data: bytes


@attrs.frozen(slots=True, repr=False)
class UdpRecord:
    """A socket of datagrams."""

    protocol: int
    local: InetAddress
    """Without a port if it is not bound."""
    peer: InetAddress | None
    """Whom it is connected to."""
    shut_down: int
    """shutdown(2): 1 reads no more, 3 neither reads nor writes."""
    datagrams: tuple[Datagram, ...]
    memberships: tuple[Membership, ...]
    options: SocketOptions
    numbers: dict[str, int]
    structs: dict[str, bytes]

    def __attrs_post_init__(self) -> None:
        """Refuse what has no datagrams."""
        if self.protocol not in _PROTOCOLS:
            raise ValueError(f"protocol {self.protocol} has no datagrams that are known")
        refuse_unknown(self.numbers, NUMBERS)
        refuse_unknown(self.structs, STRUCTS)

    @property
    def path(self) -> str:
        """What a user calls it."""
        return f"UDP {self.local.where}" + (f" to {self.peer.where}" if self.peer else "")


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return stat.S_ISSOCK(file.status.st_mode) and not file.path_only


def is_for(file: OpenFile, table: FdTable) -> bool:
    """See `Kind.is_for`."""
    nature = nature_of(file, table)
    is_inet = nature.family in (inet.AF_INET, inet.AF_INET6)
    return is_inet and nature.kind == inet.SOCK_DGRAM and nature.protocol in _PROTOCOLS


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    with borrow_beside(file, table) as sock:
        if _has_data_under_way(sock):
            return Problem(
                "is a UDP socket with a datagram that is not complete (MSG_MORE or UDP_CORK),"
                " which is not supported yet",
                "try again",
            )
        if _events(sock) & _UNSAFE_TO_PEEK == _UNSAFE_TO_PEEK:
            return Problem(
                "is a UDP socket with both datagrams and an error that were not read: to look at"
                " the ones would take the other away",
                "try again",
            )
        return network_space.problem(sock, table) or sockopts.problem(sock)


def _has_data_under_way(sock: Socket) -> bool:
    """Tell whether something is to be sent, and stays so: what is in a network card goes soon."""
    for _ in range(_TRIES):
        (n_bytes,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
        if not n_bytes:
            return False
        time.sleep(_PAUSE_S)
    return True


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> UdpRecord:
    """See `Kind.capture`."""
    with borrow_beside(file, table) as sock:
        return UdpRecord(
            protocol=sock.proto,
            local=address_of(sock.family, sock.getsockname()),
            peer=peer_of(sock),
            shut_down=_shut_down(sock),
            datagrams=tuple(_iter_datagrams(sock)) if _has_datagrams(sock) else (),
            memberships=inet.read_memberships(sock),
            options=sockopts.capture(sock),
            numbers=sockopts.read_numbers(sock, NUMBERS),
            structs=sockopts.read_structs(sock, STRUCTS),
        )


def _has_datagrams(sock: Socket) -> bool:
    """Ask without reading: that would take a pending error away."""
    return sock.proto in (_UDP, _UDPLITE) and bool(_events(sock) & select.POLLIN)


def _shut_down(sock: Socket) -> int:
    events = _events(sock)
    if events & select.POLLHUP:
        return _BOTH
    return _READING if events & select.POLLRDHUP else 0


def _events(sock: Socket) -> int:
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN | select.POLLRDHUP)
    return dict(poll.poll(0)).get(sock.fileno(), 0)


def _iter_datagrams(sock: Socket) -> Iterator[Datagram]:
    """Yield what was not read, without taking it out."""
    before = sock.getsockopt(sockopts.SOL_SOCKET, _SO_PEEK_OFF)
    sock.setsockopt(sockopts.SOL_SOCKET, _SO_PEEK_OFF, 0)
    try:
        for _ in range(_MAX_DATAGRAMS):
            data, name = sock.recvfrom(_LARGEST_BYTES, _MSG_PEEK | _MSG_DONTWAIT)
            yield Datagram(address_of(sock.family, name), data)
    except BlockingIOError:
        pass
    finally:
        sock.setsockopt(sockopts.SOL_SOCKET, _SO_PEEK_OFF, before)


def check_host(record: UdpRecord) -> Iterator[Problem]:
    """See `Kind.check_host`: try to bind, and let go again."""
    if not record.local.port:
        return
    try:
        with _new(record) as sock:
            _bind(record, sock, lambda _text: None)
    except OSError as error:
        yield Problem(
            f"cannot be bound to {record.local.where} here ({error.strerror})",
            wants_address=error.errno == inet.EADDRNOTAVAIL,
        )


def _new(record: UdpRecord) -> contextlib.AbstractContextManager[Socket]:
    return new_socket(record.local.family, inet.SOCK_DGRAM, record.protocol)


def _bind(record: UdpRecord, sock: Socket, warn: Warn) -> None:
    """Set what decides about it, and bind; in the order in which a program would have done it."""
    sockopts.restore(record.options, sock, warn, later=True)
    sockopts.set_structs(record.structs, sock, STRUCTS, warn)
    # An encapsulation and a cork would have their way with what comes and goes.
    early = {n: v for n, v in record.numbers.items() if n not in _LATE}
    sockopts.set_numbers(early, sock, NUMBERS, warn)
    if record.local.port or not record.local.is_any:
        sock.bind(record.local.sockaddr)


_LATE = frozenset({"UDP_CORK", "UDP_ENCAP"})


def open_again(record: UdpRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    warn = opening.options.warn
    with _new(record) as sock:
        _bind(record, sock, warn)
        # A connected one takes none from others, which may have come before it was.
        _send_again(record, sock, warn)
        if record.peer is not None:
            sock.connect(record.peer.sockaddr)
        inet.join_groups(record.memberships, sock, warn)
        late = {n: v for n, v in record.numbers.items() if n in _LATE}
        sockopts.set_numbers(late, sock, NUMBERS, warn)
        sockopts.restore_last(record.options, sock, warn)
        if record.shut_down:
            # Without a peer it says so, and does it.
            with contextlib.suppress(OSError):
                sock.shutdown(record.shut_down - _READING)
        fd = duplicate(sock.fileno())
    set_status_flags(fd, flags)
    return fd


def _send_again(record: UdpRecord, sock: Socket, warn: Warn) -> None:
    """Have the queue filled as it was."""
    if not record.datagrams:
        return
    before = sock.getsockopt(sockopts.SOL_SOCKET, _SO_RCVBUF)
    locks = sockopts.number_of(sock, sockopts.SOL_SOCKET, _SO_BUF_LOCK)
    room = sum(len(one.data) + _SOME_BYTES for one in record.datagrams)
    sock.setsockopt(sockopts.SOL_SOCKET, _SO_RCVBUFFORCE, room)
    for one in record.datagrams:
        try:
            flow = flow_between(_reachable(record.local, one.sender), one.sender)
            send_datagram(flow, record.protocol, one.data, scope_id=record.local.scope_id)
        except OSError as error:
            warn(f"a datagram from {one.sender.where} is lost ({error.strerror})")
    arrived = sum(1 for _ in _iter_datagrams(sock)) if _has_datagrams(sock) else 0
    if arrived < len(record.datagrams):
        warn(f"{len(record.datagrams) - arrived} datagrams to {record.local.where} are lost")
    sock.setsockopt(sockopts.SOL_SOCKET, _SO_RCVBUFFORCE, before // 2)
    if locks is not None:
        sock.setsockopt(sockopts.SOL_SOCKET, _SO_BUF_LOCK, locks)


def _reachable(local: InetAddress, sender: InetAddress) -> InetAddress:
    """Return where a socket that is bound to all addresses can be reached."""
    if not local.is_any:
        return local
    host = "127.0.0.1" if local.family == inet.AF_INET else "::1"
    if sender.host.startswith("::ffff:"):
        host = "::ffff:127.0.0.1"
    return attrs.evolve(local, host=host)


_SO_RCVBUF, _SO_BUF_LOCK = 8, 72
_SOME_BYTES = 4096
"""What a short datagram takes in a queue, at most."""


def describe(record: UdpRecord) -> str:
    """See `Kind.describe`."""
    return record.local.where + (f"->{record.peer.where}" if record.peer else "")


UDP = Kind(
    "udp",
    UdpRecord,
    matches=matches,
    is_for=is_for,
    problem=problem,
    capture=capture,
    check_host=check_host,
    open=open_again,
    describe=describe,
)
