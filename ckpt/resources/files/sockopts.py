"""The options that sockets of every family have (SOL_SOCKET), and how options are read and set.

    with borrow_socket(file, table) as sock:          dump: options of the target's own socket
        record = sockopts.capture(sock)
    with new_socket(family, kind, protocol) as sock:  restore: before bind, so that bind obeys
        sockopts.restore(record, sock, warn)

A family's own options (IP_TTL, TCP_NODELAY ...) are read and set by the same functions with tables
of its own: `read_numbers`, `set_numbers`, `read_structs`, `set_structs`.

Only what differs from a new socket of this host is set. What this kernel does not take is told by
`warn` and left as it is: an option must not cost the whole restore.

Kernel: socket(7), getsockopt(2), include/uapi/asm-generic/socket.h; SO_BUF_LOCK (5.15) tells
whether the sizes of the buffers were set; classic packet filters come back by SO_GET_FILTER.

Refused before the target is stopped (`problem`): filters that are eBPF programs. Not seen, and so
lost: programs attached for SO_REUSEPORT, SO_INCOMING_CPU, numbers already given to time stamps
(OPT_ID), memory reserved by SO_RESERVE_MEM.
"""

import contextlib
import os
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

import attrs

from ckpt.kernel import sock_filter
from ckpt.kernel.getsockopts import Getsockopts
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.open_file import OpenFile, Problem

Warn = Callable[[str], None]
Numbers = Mapping[str, tuple[int, int]]
"""Option name -> level, number; of options with an int for a value."""
Structs = Mapping[str, tuple[int, int, int]]
"""Option name -> level, number, size; of options with a structure or a name for a value."""

SOL_SOCKET = 1
SO_LOCK_FILTER = 44
_SO_SNDBUF, _SO_RCVBUF = 7, 8
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_BUF_LOCK = 32, 33, 72
_SNDBUF_LOCK, _RCVBUF_LOCK = 1, 2
_OTHERS = tuple((SOL_SOCKET, n) for n in (_SO_SNDBUF, _SO_RCVBUF, _SO_BUF_LOCK, SO_LOCK_FILTER))
_INT_BYTES = 4
_CLOEXEC = os.O_CLOEXEC
_MAX_INT = 2**31 - 1

NUMBERS: Numbers = {
    name: (SOL_SOCKET, number)
    for name, number in {
        "SO_REUSEADDR": 2,
        "SO_DONTROUTE": 5,
        "SO_BROADCAST": 6,
        "SO_KEEPALIVE": 9,
        "SO_OOBINLINE": 10,
        "SO_NO_CHECK": 11,
        "SO_PRIORITY": 12,
        "SO_REUSEPORT": 15,
        "SO_PASSCRED": 16,
        "SO_RCVLOWAT": 18,
        "SO_PASSSEC": 34,
        # The order of these six matters: each of the later ones decides how all are told.
        "SO_TIMESTAMPING": 37,
        "SO_TIMESTAMPING_NEW": 65,
        "SO_TIMESTAMP": 29,
        "SO_TIMESTAMPNS": 35,
        "SO_TIMESTAMP_NEW": 63,
        "SO_TIMESTAMPNS_NEW": 64,
        "SO_MARK": 36,
        "SO_RXQ_OVFL": 40,
        "SO_WIFI_STATUS": 41,
        "SO_PEEK_OFF": 42,
        "SO_NOFCS": 43,
        "SO_SELECT_ERR_QUEUE": 45,
        "SO_BUSY_POLL": 46,
        "SO_ZEROCOPY": 60,
        "SO_PREFER_BUSY_POLL": 69,
        "SO_BUSY_POLL_BUDGET": 70,
        "SO_TXREHASH": 74,
        "SO_RCVMARK": 75,
        "SO_PASSPIDFD": 76,
        "SO_RCVPRIORITY": 82,
        "SO_PASSRIGHTS": 83,
    }.items()
}
"""A kernel, or a family, that lacks one neither tells nor takes it."""

STRUCTS: Structs = {
    "SO_LINGER": (SOL_SOCKET, 13, 8),
    "SO_RCVTIMEO": (SOL_SOCKET, 20, 16),
    "SO_SNDTIMEO": (SOL_SOCKET, 21, 16),
    "SO_BINDTODEVICE": (SOL_SOCKET, 25, 16),
    "SO_MAX_PACING_RATE": (SOL_SOCKET, 47, 8),
    "SO_TXTIME": (SOL_SOCKET, 61, 8),
}


@attrs.frozen(slots=True, repr=False)
class SocketOptions:
    """What a socket of any family was told by setsockopt(2) at SOL_SOCKET."""

    numbers: dict[str, int]
    """Option name -> value, those of `NUMBERS`."""
    structs: dict[str, bytes]
    """Option name -> value, those of `STRUCTS`."""
    send_buffer_bytes: int
    """As set by SO_SNDBUF; 0 if the kernel chooses."""
    receive_buffer_bytes: int
    packet_filter: bytes
    """Instructions (`struct sock_filter`, 8 bytes each) of SO_ATTACH_FILTER; empty: none."""
    filter_locked: bool

    def __attrs_post_init__(self) -> None:
        """Refuse what no socket can have."""
        refuse_unknown(self.numbers, NUMBERS)
        refuse_unknown(self.structs, STRUCTS)
        refuse_too_large(self.numbers)
        if not 0 <= max(self.send_buffer_bytes, self.receive_buffer_bytes) <= _MAX_INT:
            raise ValueError("a socket cannot have buffers of such a size")
        n_instructions, rest = divmod(len(self.packet_filter), sock_filter.SIZE)
        if rest or n_instructions > sock_filter.MAX_INSTRUCTIONS:
            raise ValueError("a packet filter is cut short, or too long")


def refuse_unknown(values: Mapping[str, object], table: Mapping[str, object]) -> None:
    """Refuse values of options that are not in the table.

    Raises:
        ValueError: with their names.
    """
    unknown = values.keys() - table.keys()
    if unknown:
        raise ValueError(f"unknown socket options {sorted(unknown)}")


def refuse_too_large(numbers: Mapping[str, int]) -> None:
    """Refuse what is no int of C.

    Raises:
        ValueError: with the first name.
    """
    for name, value in numbers.items():
        if not -_MAX_INT - 1 <= value <= _MAX_INT:
            raise ValueError(f"option {name} cannot be {value}")


@contextlib.contextmanager
def borrow_socket(file: OpenFile, table: FdTable) -> Iterator[Socket]:
    """Lend a socket object on the target's socket; what is set there is set for the target."""
    with table.borrow(file) as fd:
        sock = Socket(fileno=fd)
        try:
            yield sock
        finally:
            sock.detach()


@contextlib.contextmanager
def new_socket(family: int, kind: int, protocol: int = 0) -> Iterator[Socket]:
    """Make a socket, closed on exec, and close it in the end; `duplicate` what shall stay."""
    sock = Socket(family, kind | _CLOEXEC, protocol)
    try:
        yield sock
    finally:
        sock.close()


def number_of(sock: Socket, level: int, option: int) -> int | None:
    """Return an int option; None if this kernel or family has no such."""
    try:
        return sock.getsockopt(level, option)
    except OSError:
        return None


def has_value(sock: Socket, level: int, option: int) -> bool:
    """Tell whether an option has a value at all; for what may be there only seldom."""
    try:
        return bool(sock.getsockopt(level, option, 16).rstrip(b"\0"))
    except OSError:
        return False


def problem(sock: Socket) -> Problem | None:
    """Tell why the options of a socket of the target cannot be captured."""
    try:
        sock_filter.read(sock.fileno())
    except PermissionError:
        return Problem("is a socket with an eBPF program as its filter, which is not supported yet")
    except OSError:
        pass  # a family without filters
    return None


def capture(sock: Socket) -> SocketOptions:
    """Read all options of a socket of the target."""
    others = _numbers_of(_OTHERS).read_ints(sock.fileno())
    sent, received, locks, is_locked = (value or 0 for value in others)
    return SocketOptions(
        numbers=read_numbers(sock, NUMBERS),
        structs=read_structs(sock, STRUCTS),
        # The kernel doubles what was asked for, to have room for its own records.
        send_buffer_bytes=sent // 2 if locks & _SNDBUF_LOCK else 0,
        receive_buffer_bytes=received // 2 if locks & _RCVBUF_LOCK else 0,
        packet_filter=_read_filter(sock),
        filter_locked=bool(is_locked),
    )


def _read_filter(sock: Socket) -> bytes:
    try:
        return sock_filter.read(sock.fileno())
    except OSError:
        return b""


def read_numbers(sock: Socket, table: Numbers) -> dict[str, int]:
    """Return all int options of a table that the socket has."""
    values = _numbers_of(tuple(table.values())).read_ints(sock.fileno())
    return {name: value for name, value in zip(table, values, strict=True) if value is not None}


def read_structs(sock: Socket, table: Structs) -> dict[str, bytes]:
    """Return all other options of a table that the socket has."""
    values = _structs_of(tuple(table.values())).read(sock.fileno())
    return {name: value for name, value in zip(table, values, strict=True) if value is not None}


@lru_cache
def _numbers_of(options: tuple[tuple[int, int], ...]) -> Getsockopts:
    return Getsockopts([(level, number, _INT_BYTES) for level, number in options])


@lru_cache
def _structs_of(options: tuple[tuple[int, int, int], ...]) -> Getsockopts:
    return Getsockopts(options)


def restore(options: SocketOptions, sock: Socket, warn: Warn, *, later: bool = False) -> None:
    """Set all options of a new socket, but those that stand in the way of filling its queue.

    Args:
        options: as captured.
        sock: the new one.
        warn: hears of what this kernel does not take.
        later: whether `restore_last` will be called, once the queue is filled.
    """
    set_structs(options.structs, sock, STRUCTS, warn)
    early = {name: value for name, value in options.numbers.items() if name not in _LAST}
    set_numbers(early, sock, NUMBERS, warn)
    if options.send_buffer_bytes:
        sock.setsockopt(SOL_SOCKET, _SO_SNDBUFFORCE, options.send_buffer_bytes)
    if options.receive_buffer_bytes:
        sock.setsockopt(SOL_SOCKET, _SO_RCVBUFFORCE, options.receive_buffer_bytes)
    if not later:
        restore_last(options, sock, warn)


_LAST = frozenset({"SO_PEEK_OFF"})
"""It moves with everything that is put into, or taken from, the queue."""


def restore_last(options: SocketOptions, sock: Socket, warn: Warn) -> None:
    """Set what `restore` with `later` has left: the filter would judge what fills the queue."""
    late = {name: value for name, value in options.numbers.items() if name in _LAST}
    set_numbers(late, sock, NUMBERS, warn)
    if options.packet_filter:
        sock_filter.attach(sock.fileno(), options.packet_filter)
    if options.filter_locked:
        sock.setsockopt(SOL_SOCKET, SO_LOCK_FILTER, 1)


def set_numbers(values: Mapping[str, int], sock: Socket, table: Numbers, warn: Warn) -> None:
    """Set the int options that differ, in the order of the table."""
    for name, (level, option) in table.items():
        if name in values and number_of(sock, level, option) != values[name]:
            with _telling(name, warn):
                sock.setsockopt(level, option, values[name])


def set_structs(values: Mapping[str, bytes], sock: Socket, table: Structs, warn: Warn) -> None:
    """Set the other options that differ, in the order of the table."""
    for name, (level, option, size) in table.items():
        if name not in values:
            continue
        with _telling(name, warn):
            if values[name].rstrip(b"\0") != sock.getsockopt(level, option, size).rstrip(b"\0"):
                sock.setsockopt(level, option, values[name])


@contextlib.contextmanager
def _telling(name: str, warn: Warn) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        warn(f"a socket cannot have its option {name} here ({error.strerror})")
