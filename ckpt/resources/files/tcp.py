"""TCP sockets that no peer is connected to: listening, bound, or just made.

Kernel: tcp(7), ip(7), ipv6(7), socket(7), getsockopt(2) on a duplicate (pidfd_getfd(2)); TCP_INFO
for the state, the backlog (tcpi_sacked of a listening socket) and the queue (tcpi_unacked).

Options are set where a new socket of this host has another value: sockets that are accepted later
inherit them. A port is refused, before anything starts, while somebody else has it, or while closed
connections of a program that did not set SO_REUSEADDR wait for their end (TIME_WAIT).

Refused before the target is stopped: connections that wait to be accepted, packet filters, kernel
TLS, other protocols, other network namespaces. Not seen, and so lost: TCP_MD5SIG keys, programs
attached for SO_REUSEPORT, SO_INCOMING_CPU.
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
from ckpt.resources.files import network_space
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, duplicate, set_status_flags
from ckpt.resources.files.network_space import borrow_beside
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.units import Fd

_AF_INET, _AF_INET6 = 2, 10
_FAMILIES = {1: "unix", _AF_INET: "IPv4", _AF_INET6: "IPv6", 16: "netlink", 17: "packet"}
_SOCK_STREAM, _SOCK_CLOEXEC = 1, os.O_CLOEXEC
_IPPROTO_TCP, _IPPROTO_UDP = 6, 17
_SOL, _TCP, _IP, _IPV6 = 1, _IPPROTO_TCP, 0, 41
_SO_SNDBUF, _SO_RCVBUF, _SO_GET_FILTER = 7, 8, 26
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_BUF_LOCK = 32, 33, 72
_SNDBUF_LOCK, _RCVBUF_LOCK = 1, 2
_TCP_INFO_OPTION, _TCP_ULP = 11, 31
_TCP_LISTEN = 10
_TCP_INFO = struct.Struct("<8B24I4Q2I")
"""The start of `struct tcp_info`, up to tcpi_segs_in (include/uapi/linux/tcp.h)."""
_UNACKED, _SACKED = 8 + 4, 8 + 5
_EADDRINUSE = 98

_REUSE = "SO_REUSEADDR"

_NUMBERS: dict[str, tuple[int, int]] = {
    "SO_REUSEADDR": (_SOL, 2),
    "SO_DONTROUTE": (_SOL, 5),
    "SO_KEEPALIVE": (_SOL, 9),
    "SO_OOBINLINE": (_SOL, 10),
    "SO_PRIORITY": (_SOL, 12),
    "SO_REUSEPORT": (_SOL, 15),
    "SO_RCVLOWAT": (_SOL, 18),
    "SO_TIMESTAMP": (_SOL, 29),
    "SO_MARK": (_SOL, 36),
    "SO_BUSY_POLL": (_SOL, 46),
    "SO_ZEROCOPY": (_SOL, 60),
    "IP_TOS": (_IP, 1),
    "IP_TTL": (_IP, 2),
    "IP_MTU_DISCOVER": (_IP, 10),
    "IP_RECVERR": (_IP, 11),
    "IP_FREEBIND": (_IP, 15),
    "IP_TRANSPARENT": (_IP, 19),
    "IP_BIND_ADDRESS_NO_PORT": (_IP, 24),
    "IPV6_UNICAST_HOPS": (_IPV6, 16),
    "IPV6_MTU_DISCOVER": (_IPV6, 23),
    "IPV6_V6ONLY": (_IPV6, 26),
    "IPV6_TCLASS": (_IPV6, 67),
    "IPV6_FREEBIND": (_IPV6, 78),
    "TCP_NODELAY": (_TCP, 1),
    "TCP_MAXSEG": (_TCP, 2),
    "TCP_CORK": (_TCP, 3),
    "TCP_KEEPIDLE": (_TCP, 4),
    "TCP_KEEPINTVL": (_TCP, 5),
    "TCP_KEEPCNT": (_TCP, 6),
    "TCP_SYNCNT": (_TCP, 7),
    "TCP_LINGER2": (_TCP, 8),
    "TCP_DEFER_ACCEPT": (_TCP, 9),
    "TCP_WINDOW_CLAMP": (_TCP, 10),
    "TCP_USER_TIMEOUT": (_TCP, 18),
    "TCP_FASTOPEN": (_TCP, 23),
    "TCP_NOTSENT_LOWAT": (_TCP, 25),
    "TCP_SAVE_SYN": (_TCP, 27),
}
"""Options with an int for a value. A kernel that lacks one neither tells nor takes it."""

_STRUCTS: dict[str, tuple[int, int, int]] = {
    "SO_LINGER": (_SOL, 13, 8),
    "SO_RCVTIMEO": (_SOL, 20, 16),
    "SO_SNDTIMEO": (_SOL, 21, 16),
    "SO_BINDTODEVICE": (_SOL, 25, 16),
    "TCP_CONGESTION": (_TCP, 13, 16),
}
"""Options with a structure or a name for a value, and its size."""


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

    def __attrs_post_init__(self) -> None:
        """Refuse what is no TCP socket."""
        if self.family not in (_AF_INET, _AF_INET6):
            raise ValueError(f"family {self.family} has no TCP")
        unknown = (self.numbers.keys() - _NUMBERS.keys()) | (self.structs.keys() - _STRUCTS.keys())
        if unknown:
            raise ValueError(f"unknown socket options {sorted(unknown)}")

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
    if _has(sock, _SOL, _SO_GET_FILTER):
        return Problem("is a TCP socket with a packet filter, which is not supported yet")
    if _has(sock, _TCP, _TCP_ULP):
        return Problem("is a TCP socket with an upper layer (TLS), which is not supported yet")
    return None


def _name_of(sock: Socket) -> str:
    if sock.family in (_AF_INET, _AF_INET6) and sock.proto == _IPPROTO_UDP:
        return "a UDP socket"
    family = _FAMILIES.get(sock.family, f"family {sock.family}")
    return f"a socket of {family}, protocol {sock.proto}" if sock.proto else f"a {family} socket"


def _read_info(sock: Socket) -> tuple[int, ...]:
    raw = sock.getsockopt(_TCP, _TCP_INFO_OPTION, _TCP_INFO.size)
    values: tuple[int, ...] = _TCP_INFO.unpack(raw.ljust(_TCP_INFO.size, b"\0"))
    return values


def _has(sock: Socket, level: int, option: int) -> bool:
    """Tell whether an option has a value at all; for what may be there only seldom."""
    try:
        return bool(sock.getsockopt(level, option, 16).rstrip(b"\0"))
    except OSError:
        return False


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> TcpRecord:
    """See `Kind.capture`."""
    with borrow_beside(file, table) as sock:
        info = _read_info(sock)
        address, port, flow_info, scope_id = (*sock.getsockname(), 0, 0)[:4]
        locks = _number(sock, _SOL, _SO_BUF_LOCK) or 0
        return TcpRecord(
            family=int(sock.family),
            address=address,
            port=port,
            flow_info=flow_info,
            scope_id=scope_id,
            backlog=info[_SACKED] if info[0] == _TCP_LISTEN else -1,
            numbers=_read_numbers(sock),
            structs=_read_structs(sock),
            # The kernel doubles what was asked for, to have room for its own records.
            send_buffer_bytes=(
                sock.getsockopt(_SOL, _SO_SNDBUF) // 2 if locks & _SNDBUF_LOCK else 0
            ),
            receive_buffer_bytes=(
                sock.getsockopt(_SOL, _SO_RCVBUF) // 2 if locks & _RCVBUF_LOCK else 0
            ),
        )


def _number(sock: Socket, level: int, option: int) -> int | None:
    try:
        return sock.getsockopt(level, option)
    except OSError:
        return None


def _read_numbers(sock: Socket) -> dict[str, int]:
    values = {name: _number(sock, *option) for name, option in _NUMBERS.items()}
    return {name: value for name, value in values.items() if value is not None}


def _read_structs(sock: Socket) -> dict[str, bytes]:
    values: dict[str, bytes] = {}
    for name, (level, option, size) in _STRUCTS.items():
        try:
            values[name] = sock.getsockopt(level, option, size)
        except OSError:
            continue
    return values


def check_host(record: TcpRecord) -> Iterator[Problem]:
    """See `Kind.check_host`: try to bind, and let go again."""
    if not record.port:
        return
    try:
        with _new_socket(record.family) as sock:
            _bind(record, sock)
    except OSError as error:
        remedy = (
            "end who has it; its closed connections take a minute"
            if error.errno == _EADDRINUSE
            else ""
        )
        yield Problem(f"cannot be bound to {record.where} here ({error.strerror})", remedy)


def _bind(record: TcpRecord, sock: Socket) -> None:
    """Set all options, some of which decide whether it can be bound, and bind."""
    for name, value in record.structs.items():
        level, option, size = _STRUCTS[name]
        if value.rstrip(b"\0") != sock.getsockopt(level, option, size).rstrip(b"\0"):
            sock.setsockopt(level, option, value)
    for name, number in record.numbers.items():
        if _number(sock, *_NUMBERS[name]) != number:
            sock.setsockopt(*_NUMBERS[name], number)
    if record.send_buffer_bytes:
        sock.setsockopt(_SOL, _SO_SNDBUFFORCE, record.send_buffer_bytes)
    if record.receive_buffer_bytes:
        sock.setsockopt(_SOL, _SO_RCVBUFFORCE, record.receive_buffer_bytes)
    if record.port:
        sock.bind(record.sockaddr)


def open_again(record: TcpRecord, flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    with _new_socket(record.family) as sock:
        # Its own connections may have the port before it: `tcp_rebuild` binds them regardless.
        reuse = record.numbers.get(_REUSE, 0)
        _bind(attrs.evolve(record, numbers=record.numbers | {_REUSE: 1}), sock)
        if record.backlog >= 0:
            sock.listen(record.backlog)
        sock.setsockopt(*_NUMBERS[_REUSE], reuse)
        fd = duplicate(sock.fileno())
    set_status_flags(fd, flags)
    return fd


TCP = Kind(
    "tcp",
    TcpRecord,
    matches=matches,
    problem=problem,
    capture=capture,
    check_host=check_host,
    open=open_again,
)
