"""TCP sockets that no peer is connected to: listening, bound, or just made.

Kernel: tcp(7), ip(7), ipv6(7), socket(7), getsockopt(2) on a duplicate (pidfd_getfd(2)); TCP_INFO
for the state, the backlog (tcpi_sacked of a listening socket) and the queue (tcpi_unacked).

Options are set where a new socket of this host has another value, the packet filter too: sockets
that are accepted later inherit them. A port is refused, before anything starts, while somebody else
has it, or while closed connections of a program that did not set SO_REUSEADDR wait for their end
(TIME_WAIT).

Refused before the target is stopped: connections that wait to be accepted, filters of eBPF, kernel
TLS, other protocols, other network namespaces. Not seen, and so lost: TCP_MD5SIG keys, and what
`sockopts` does not see.
"""

import contextlib
import os
import stat
import struct
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterator

import attrs

from ckpt.process.remote import Reply
from ckpt.resources.base import Opening
from ckpt.resources.files import network_space, sockopts, tcp_record
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, duplicate, set_status_flags
from ckpt.resources.files.network_space import borrow_beside
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.resources.files.sockopts import Numbers, SocketOptions, Structs, Warn
from ckpt.units import Fd

_AF_INET, _AF_INET6 = 2, 10
_FAMILIES = {1: "unix", _AF_INET: "IPv4", _AF_INET6: "IPv6", 16: "netlink", 17: "packet"}
_SOCK_STREAM, _SOCK_CLOEXEC = 1, os.O_CLOEXEC
_IPPROTO_TCP, _IPPROTO_UDP = 6, 17
_SOL, _TCP = sockopts.SOL_SOCKET, _IPPROTO_TCP
_TCP_INFO_OPTION, _TCP_ULP = 11, 31
_TCP_LISTEN = 10
_TCP_INFO = struct.Struct("<8B24I4Q2I")
"""The start of `struct tcp_info`, up to tcpi_segs_in (include/uapi/linux/tcp.h)."""
_UNACKED, _SACKED = 8 + 4, 8 + 5
_EADDRINUSE, _EADDRNOTAVAIL = 98, 99

_REUSE = "SO_REUSEADDR"

_NUMBERS: Numbers = (
    dict(sockopts.NUMBERS)
    | dict(tcp_record.NUMBERS)
    | {
        "TCP_MAXSEG": (_TCP, 2),
        "TCP_DEFER_ACCEPT": (_TCP, 9),
        "TCP_WINDOW_CLAMP": (_TCP, 10),
        "TCP_FASTOPEN": (_TCP, 23),
        "TCP_SAVE_SYN": (_TCP, 27),
        "TCP_FASTOPEN_CONNECT": (_TCP, 30),
        "TCP_FASTOPEN_NO_COOKIE": (_TCP, 34),
    }
)
_OWN_NUMBERS = {name: option for name, option in _NUMBERS.items() if option[0] != _SOL}
_STRUCTS: Structs = dict(sockopts.STRUCTS) | dict(tcp_record.STRUCTS)


@attrs.frozen(slots=True, repr=False)
class TcpRecord:
    """A socket without a peer."""

    family: int
    """AF_INET or AF_INET6."""
    address: str
    port: int
    """0 if it is not bound."""
    flow_info: int
    scope_id: int
    backlog: int
    """Of listen(2); -1 if it does not listen."""
    numbers: dict[str, int]
    """Option name -> value, those of `_NUMBERS`."""
    structs: dict[str, bytes]
    """Option name -> value, those of `_STRUCTS`."""
    send_buffer_bytes: int
    """As set by SO_SNDBUF; 0 if the kernel chooses."""
    receive_buffer_bytes: int
    packet_filter: bytes = b""
    """As in `SocketOptions`."""
    filter_locked: bool = False

    def __attrs_post_init__(self) -> None:
        """Refuse what is no TCP socket."""
        if self.family not in (_AF_INET, _AF_INET6):
            raise ValueError(f"family {self.family} has no TCP")
        sockopts.refuse_unknown(self.numbers, _NUMBERS)
        sockopts.refuse_unknown(self.structs, _STRUCTS)

    @property
    def own(self) -> SocketOptions:
        """What sockets of every family have."""
        return SocketOptions(
            {name: n for name, n in self.numbers.items() if name in sockopts.NUMBERS},
            {name: value for name, value in self.structs.items() if name in sockopts.STRUCTS},
            self.send_buffer_bytes,
            self.receive_buffer_bytes,
            self.packet_filter,
            self.filter_locked,
        )

    @property
    def where(self) -> str:
        """Address and port."""
        host = f"[{self.address}]" if self.family == _AF_INET6 else self.address
        return f"{host}:{self.port}"

    @property
    def sockaddr(self) -> tuple[object, ...]:
        """What bind(2) takes."""
        if self.family == _AF_INET:
            return self.address, self.port
        return self.address, self.port, self.flow_info, self.scope_id


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return stat.S_ISSOCK(file.status.st_mode) and not file.path_only


def is_tcp(sock: Socket) -> bool:
    """Tell whether it is a TCP socket, of IPv4 or IPv6."""
    return sock.family in (_AF_INET, _AF_INET6) and sock.proto == _IPPROTO_TCP


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    with borrow_beside(file, table) as sock:
        return _problem_of(sock, table)


@contextlib.contextmanager
def _new_socket(family: int) -> Iterator[Socket]:
    sock = Socket(family, _SOCK_STREAM | _SOCK_CLOEXEC, _IPPROTO_TCP)
    try:
        yield sock
    finally:
        sock.close()


def _problem_of(sock: Socket, table: FdTable) -> Problem | None:
    if not is_tcp(sock):
        return Problem(f"is {_name_of(sock)}, which is not supported yet")
    elsewhere = network_space.problem(sock, table)
    if elsewhere:
        return elsewhere
    info = _read_info(sock)
    state = info[0]
    if state == _TCP_LISTEN and info[_UNACKED]:
        n = info[_UNACKED]
        what = "1 connection waits" if n == 1 else f"{n} connections wait"
        return Problem(f"is a listening TCP socket, and {what} to be accepted", "try again")
    if sockopts.has_value(sock, _TCP, _TCP_ULP):
        return Problem("is a TCP socket with an upper layer (TLS), which is not supported yet")
    return sockopts.problem(sock)


def _name_of(sock: Socket) -> str:
    if sock.family in (_AF_INET, _AF_INET6) and sock.proto == _IPPROTO_UDP:
        return "a UDP socket"
    family = _FAMILIES.get(sock.family, f"family {sock.family}")
    return f"a socket of {family}, protocol {sock.proto}" if sock.proto else f"a {family} socket"


def _read_info(sock: Socket) -> tuple[int, ...]:
    raw = sock.getsockopt(_TCP, _TCP_INFO_OPTION, _TCP_INFO.size)
    values: tuple[int, ...] = _TCP_INFO.unpack(raw.ljust(_TCP_INFO.size, b"\0"))
    return values


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> TcpRecord:
    """See `Kind.capture`."""
    with borrow_beside(file, table) as sock:
        info = _read_info(sock)
        address, port, flow_info, scope_id = (*sock.getsockname(), 0, 0)[:4]
        options = sockopts.capture(sock)
        return TcpRecord(
            family=int(sock.family),
            address=address,
            port=port,
            flow_info=flow_info,
            scope_id=scope_id,
            backlog=info[_SACKED] if info[0] == _TCP_LISTEN else -1,
            numbers=options.numbers | sockopts.read_numbers(sock, _OWN_NUMBERS),
            structs=options.structs | sockopts.read_structs(sock, tcp_record.STRUCTS),
            send_buffer_bytes=options.send_buffer_bytes,
            receive_buffer_bytes=options.receive_buffer_bytes,
            packet_filter=options.packet_filter,
            filter_locked=options.filter_locked,
        )


def check_host(record: TcpRecord) -> Iterator[Problem]:
    """See `Kind.check_host`: try to bind, and let go again."""
    if not record.port:
        return
    try:
        with _new_socket(record.family) as sock:
            _bind(record, sock, lambda _text: None)
    except OSError as error:
        remedy = (
            "end who has it; its closed connections take a minute"
            if error.errno == _EADDRINUSE
            else ""
        )
        yield Problem(
            f"cannot be bound to {record.where} here ({error.strerror})",
            remedy,
            wants_address=error.errno == _EADDRNOTAVAIL,
        )


def _bind(record: TcpRecord, sock: Socket, warn: Warn) -> None:
    """Set all options, some of which decide whether it can be bound, and bind."""
    sockopts.restore(record.own, sock, warn, later=True)
    sockopts.set_structs(record.structs, sock, tcp_record.STRUCTS, warn)
    sockopts.set_numbers(record.numbers, sock, _OWN_NUMBERS, warn)
    if record.port:
        sock.bind(record.sockaddr)


def open_again(record: TcpRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    warn = opening.options.warn
    with _new_socket(record.family) as sock:
        # Its own connections may have the port before it: `tcp_rebuild` binds them regardless.
        reuse = record.numbers.get(_REUSE, 0)
        _bind(attrs.evolve(record, numbers=record.numbers | {_REUSE: 1}), sock, warn)
        if record.backlog >= 0:
            sock.listen(record.backlog)
        sock.setsockopt(*_NUMBERS[_REUSE], reuse)
        sockopts.restore_last(record.own, sock, warn)
        fd = duplicate(sock.fileno())
    set_status_flags(fd, flags)
    return fd


def describe(record: TcpRecord) -> str:
    """See `Kind.describe`."""
    where = f"[{record.address}]" if ":" in record.address else record.address
    return f"{where}:{record.port}" + (" (listens)" if record.backlog >= 0 else "")


TCP = Kind(
    "tcp",
    TcpRecord,
    matches=matches,
    problem=problem,
    capture=capture,
    check_host=check_host,
    open=open_again,
    describe=describe,
)
