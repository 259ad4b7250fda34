"""TCP_REPAIR: the state of a connection, read and set from outside of the protocol.

A socket under repair sends nothing by itself: what is written to it goes into one of its queues,
connect(2) makes it established without a word to the peer, and closing it is silent.

Source: include/uapi/linux/tcp.h, net/ipv4/tcp.c (`tcp_repair_*`); CAP_NET_ADMIN.
"""

import fcntl
import struct
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from array import array
from collections.abc import Iterable
from typing import Final

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.burst import Burst
from ckpt.kernel.libc import writable_address

SOL_SOCKET: Final = 1
SO_REUSEADDR: Final = 2
SOL_TCP: Final = 6
TCP_MAXSEG: Final = 2
TCP_INFO: Final = 11
TCP_REPAIR: Final = 19
TCP_REPAIR_QUEUE: Final = 20
TCP_QUEUE_SEQ: Final = 21
TCP_REPAIR_OPTIONS: Final = 22
TCP_TIMESTAMP: Final = 24
TCP_REPAIR_WINDOW: Final = 29

TCP_REPAIR_ON: Final = 1
TCP_REPAIR_OFF: Final = 0
"""Ends with a window probe, which has the peer tell its window again."""
TCP_REPAIR_OFF_NO_WP: Final = -1
"""Ends without (4.19)."""

TCP_NO_QUEUE, TCP_RECV_QUEUE, TCP_SEND_QUEUE = range(3)

TCPOPT_MSS: Final = 2
TCPOPT_WINDOW: Final = 3
TCPOPT_SACK_PERM: Final = 4
TCPOPT_TIMESTAMP: Final = 8

TCPI_OPT_TIMESTAMPS: Final = 1
TCPI_OPT_SACK: Final = 2
TCPI_OPT_WSCALE: Final = 4

TCP_ESTABLISHED: Final = 1
TCP_SYN_SENT: Final = 2
TCP_SYN_RECV: Final = 3
TCP_FIN_WAIT1: Final = 4
TCP_FIN_WAIT2: Final = 5
TCP_TIME_WAIT: Final = 6
TCP_CLOSE: Final = 7
TCP_CLOSE_WAIT: Final = 8
TCP_LAST_ACK: Final = 9
TCP_LISTEN: Final = 10
TCP_CLOSING: Final = 11

_WORD = struct.Struct("=I")
_OPTION = struct.Struct("=II")
"""`struct tcp_repair_opt`."""
_WINDOW = struct.Struct("=5I")
"""`struct tcp_repair_window`."""
_INFO = struct.Struct("<8B24I4Q2I")
"""The start of `struct tcp_info`, up to tcpi_segs_in."""
_MSG_PEEK, _MSG_DONTWAIT = 2, 0x40
_SEQ_MASK = 0xFFFF_FFFF


@attrs.frozen(slots=True)
class Info:
    """What TCP_INFO tells that is of use here."""

    state: int
    options: int
    """TCPI_OPT_..."""
    send_scale: int
    receive_scale: int
    unacked: int
    """Of a listening socket: how many wait to be accepted."""
    sacked: int
    """Of a listening socket: its backlog."""
    segments_out: int


def read_info(sock: Socket) -> Info:
    """Return what TCP_INFO tells.

    Raises:
        OSError: it is no TCP socket.
    """
    raw = sock.getsockopt(SOL_TCP, TCP_INFO, _INFO.size)
    words: tuple[int, ...] = _INFO.unpack(raw.ljust(_INFO.size, b"\0"))
    return Info(words[0], words[5], words[6] & 15, words[6] >> 4, words[12], words[13], words[36])


def count_bytes(sock: Socket, request: int) -> int:
    """Return how many bytes are in a queue, by SIOCINQ (FIONREAD), SIOCOUTQ or SIOCOUTQNSD.

    The latter two count a FIN of ours as a byte: until it is acknowledged, until it is sent.
    """
    (n_bytes,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), request, bytes(4)))
    return int(n_bytes)


@attrs.frozen(slots=True)
class Window:
    """`struct tcp_repair_window`: what was announced, by both sides."""

    send_wl1: int
    """The number of the segment that told `send_bytes` last."""
    send_bytes: int
    largest_bytes: int
    receive_bytes: int
    receive_wup: int
    """What was next to come when `receive_bytes` was told."""

    def pack(self) -> bytes:
        """Return the kernel's structure."""
        return _WINDOW.pack(*attrs.astuple(self))


@attrs.frozen(slots=True)
class Repaired:
    """A connection as repair shows it."""

    write_seq: int
    """The number of the next byte to be written."""
    receive_next: int
    """The number of the next byte to come."""
    sent: bytes
    """What was written and not yet acknowledged; the end of it may not have been sent."""
    received: bytes
    """What has come and was not yet read."""
    window: Window
    clock: int
    """The value of our time stamps at this moment, as TCP_TIMESTAMP has it."""
    max_segment_bytes: int
    """What the peer takes (its MSS option)."""


def read_connection(sock: Socket, n_sent: int, n_received: int, *, reuse_address: int) -> Repaired:
    """Read a connection by one burst of calls, between whose first and last it is under repair.

    State: nobody uses it (its owners are frozen) and its packets are held: both lengths hold.

    Args:
        sock: of the connection; not listening, not closed.
        n_sent: bytes not yet acknowledged (SIOCOUTQ), without a FIN.
        n_received: bytes to be read (SIOCINQ).
        reuse_address: SO_REUSEADDR as it is now; repair overwrites it.

    Raises:
        OSError: EPERM, no CAP_NET_ADMIN; EINVAL, it is not connected; EAGAIN, another length.
    """
    reading = _Reading(sock.fileno())
    reading.set(SOL_TCP, TCP_REPAIR, TCP_REPAIR_ON)
    reading.set(SOL_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
    write_seq = reading.get(TCP_QUEUE_SEQ, _WORD.size)
    sent = reading.peek(n_sent)
    reading.set(SOL_TCP, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE)
    receive_next = reading.get(TCP_QUEUE_SEQ, _WORD.size)
    received = reading.peek(n_received)
    window = reading.get(TCP_REPAIR_WINDOW, _WINDOW.size)
    clock = reading.get(TCP_TIMESTAMP, _WORD.size)
    max_segment = reading.get(TCP_MAXSEG, _WORD.size)
    reading.set(SOL_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
    reading.set(SOL_SOCKET, SO_REUSEADDR, reuse_address)
    reading.run()
    return Repaired(
        write_seq=_WORD.unpack(write_seq)[0],
        receive_next=_WORD.unpack(receive_next)[0],
        sent=bytes(sent),
        received=bytes(received),
        window=Window(*_WINDOW.unpack(window)),
        clock=_WORD.unpack(clock)[0],
        max_segment_bytes=_WORD.unpack(max_segment)[0],
    )


class _Reading:
    """Calls on one socket, and the memory that they read and write."""

    def __init__(self, fd: int) -> None:
        """Begin with no call."""
        self._fd = fd
        self._burst = Burst()
        self._kept: list[object] = []
        self._wanted: list[int] = []

    def set(self, level: int, option: int, value: int) -> None:
        word = array("i", [value])
        self._kept.append(word)
        self._add(0, NR.setsockopt, self._fd, level, option, word.buffer_info()[0], word.itemsize)

    def get(self, option: int, n_bytes: int) -> bytearray:
        value, size = bytearray(n_bytes), array("i", [n_bytes])
        self._kept.append(size)
        address, _ = writable_address(value)
        size_at = size.buffer_info()[0]
        self._add(0, NR.getsockopt, self._fd, SOL_TCP, option, address, size_at)
        return value

    def peek(self, n_bytes: int) -> bytearray:
        data = bytearray(n_bytes)
        if n_bytes:
            address, _ = writable_address(data)
            flags = _MSG_PEEK | _MSG_DONTWAIT
            self._add(n_bytes, NR.recvfrom, self._fd, address, n_bytes, flags)
        return data

    def _add(self, wanted: int, nr: NR, *args: int) -> None:
        self._burst.add(nr, *args)
        self._wanted.append(wanted)

    def run(self) -> None:
        """Make all calls; the last ones, which end the repair, whatever became of the others."""
        for wanted, result in zip(self._wanted, self._burst.run(), strict=True):
            if result < 0:
                raise OSError(-result, f"reading a connection: errno {-result}")
            if result != wanted:
                raise BlockingIOError(11, f"a queue had {result} bytes instead of {wanted}")


def silence(fd: int) -> int:
    """Have a connection end without a word when it is closed: it stays under repair.

    Returns:
        SO_REUSEADDR as it was, for `end_silence`.

    Raises:
        OSError: EPERM, no CAP_NET_ADMIN.
    """
    sock = Socket(fileno=fd)
    try:
        reuse_address = sock.getsockopt(SOL_SOCKET, SO_REUSEADDR)
        sock.setsockopt(SOL_TCP, TCP_REPAIR, TCP_REPAIR_ON)
    finally:
        sock.detach()
    return reuse_address


def end_silence(fd: int, reuse_address: int) -> None:
    """Take `silence` back.

    Raises:
        OSError: EPERM, no CAP_NET_ADMIN.
    """
    sock = Socket(fileno=fd)
    try:
        sock.setsockopt(SOL_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
        sock.setsockopt(SOL_SOCKET, SO_REUSEADDR, reuse_address)
    finally:
        sock.detach()


def set_sequences(sock: Socket, write_seq: int, receive_next: int) -> None:
    """Choose the numbers of an unconnected socket under repair: the next byte of each direction.

    Raises:
        OSError: EPERM, it is connected or not under repair.
    """
    for queue, number in ((TCP_SEND_QUEUE, write_seq), (TCP_RECV_QUEUE, receive_next)):
        sock.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, queue)
        sock.setsockopt(SOL_TCP, TCP_QUEUE_SEQ, _WORD.pack(number & _SEQ_MASK))


def set_options(sock: Socket, info: Info, max_segment_bytes: int, clock: int) -> None:
    """Give a socket that repair has just connected what the handshake had settled.

    Raises:
        OSError: EPERM, it has sent something, or is not under repair.
    """
    options = [(TCPOPT_MSS, max_segment_bytes)]
    if info.options & TCPI_OPT_WSCALE:
        options.append((TCPOPT_WINDOW, info.send_scale | info.receive_scale << 16))
    if info.options & TCPI_OPT_SACK:
        options.append((TCPOPT_SACK_PERM, 0))
    if info.options & TCPI_OPT_TIMESTAMPS:
        options.append((TCPOPT_TIMESTAMP, 0))
    raw = b"".join(_OPTION.pack(code, value) for code, value in options)
    sock.setsockopt(SOL_TCP, TCP_REPAIR_OPTIONS, raw)
    if info.options & TCPI_OPT_TIMESTAMPS:
        sock.setsockopt(SOL_TCP, TCP_TIMESTAMP, _WORD.pack(clock))


def fill_queue(sock: Socket, queue: int, parts: Iterable[bytes]) -> None:
    """Put bytes into a queue of a connected socket under repair; those to send count as sent.

    Raises:
        OSError: they do not fit.
    """
    sock.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, queue)
    for part in parts:
        left = memoryview(part)
        while left:
            # Non-blocking: a full buffer of a stopped connection is never going to be emptied.
            left = left[sock.send(left, _MSG_DONTWAIT) :]
    sock.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE)
