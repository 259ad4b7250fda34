"""Making TCP connections anew; the story is told in `tcp_connection`.

An ended connection is made by making one: to a socket of ours on the loopback, which sends what
was not read and resets it. So the kernel has set everything that a program can notice.
"""

import contextlib
import errno
import termios
import time
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from typing import TYPE_CHECKING

import attrs

from ckpt.kernel.inet_diag import destroy_tcp, read_tcp_state
from ckpt.kernel.tcp_repair import (
    SO_REUSEADDR,
    SOL_SOCKET,
    SOL_TCP,
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_CLOSING,
    TCP_ESTABLISHED,
    TCP_FIN_WAIT1,
    TCP_FIN_WAIT2,
    TCP_LAST_ACK,
    TCP_NO_QUEUE,
    TCP_RECV_QUEUE,
    TCP_REPAIR,
    TCP_REPAIR_OFF,
    TCP_REPAIR_ON,
    TCP_REPAIR_QUEUE,
    TCP_REPAIR_WINDOW,
    TCP_SEND_QUEUE,
    TCP_TIME_WAIT,
    Window,
    count_bytes,
    fill_queue,
    read_info,
    set_options,
    set_sequences,
)
from ckpt.kernel.tcp_segment import ACK, FIN, send_as_peer
from ckpt.resources.base import Opening
from ckpt.resources.files import inet, sockopts
from ckpt.resources.files.inet import InetAddress
from ckpt.resources.files.kind import duplicate, set_status_flags
from ckpt.resources.files.network_hold import RestoreHold, restore_hold
from ckpt.resources.files.sockopts import Warn, new_socket
from ckpt.resources.files.tcp_record import (
    FIN_RECEIVED,
    FIN_SENT,
    NUMBERS,
    STATES,
    STRUCTS,
    TcpConnectionRecord,
    Transmission,
)
from ckpt.units import Fd

if TYPE_CHECKING:
    import socket

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_BUF_LOCK, _SO_ERROR, _SO_LINGER = 32, 33, 72, 4, 13
_TCP_WINDOW_CLAMP = 10
_SHUT_RD, _SHUT_WR = 0, 1
_MSG_DONTWAIT = 0x40
_ROOM = 4
"""A segment takes that many times more memory than its bytes, at worst by far less."""
_SOME_BYTES = 1 << 16
_LOOPBACK_S = 5.0
_RESET_AT_ONCE = (1).to_bytes(4, "little") + bytes(4)
"""`struct linger` with which close(2) resets."""


def try_connection(record: TcpConnectionRecord) -> None:
    """Have the connection for a moment, under repair, without a word to anybody.

    What is left of the same connection for a minute (TIME_WAIT) belongs to nobody, and is ended.

    Raises:
        OSError: EADDRNOTAVAIL, this host has no such address, or has the connection; EPERM, ...
    """
    if read_tcp_state(record.flow) == TCP_TIME_WAIT:
        with contextlib.suppress(OSError):
            destroy_tcp(record.flow)
    with new_socket(record.local.family, inet.SOCK_STREAM, inet.IPPROTO_TCP) as sock:
        _establish(record, sock, lambda _text: None)


def has_address(address: InetAddress) -> bool:
    """Tell whether this host has an address."""
    try:
        with new_socket(address.family, inet.SOCK_STREAM, inet.IPPROTO_TCP) as sock:
            sock.bind(attrs.evolve(address, port=0).sockaddr)
    except OSError:
        return False
    return True


def expect(record: TcpConnectionRecord, opening: Opening) -> None:
    """See `Kind.expect`: a packet that comes before the socket would be answered by a reset."""
    if record.transmission is not None and not opening.options.tcp_close:
        restore_hold(opening).hold(record.flow)


def open_again(record: TcpConnectionRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    warn = opening.options.warn
    transmission = record.transmission
    hold = restore_hold(opening)
    if transmission is not None:
        hold.release_later([transmission.hold])
    with new_socket(record.local.family, inet.SOCK_STREAM, inet.IPPROTO_TCP) as sock:
        if transmission is None or opening.options.tcp_close:
            _make_ended(record, sock, warn)
        else:
            hold.hold(record.flow)
            _make_alive(record, transmission, sock, warn)
            _finish_later(record, sock, hold, warn)
        fd = duplicate(sock.fileno())
    set_status_flags(fd, flags)
    return fd


def _establish(record: TcpConnectionRecord, sock: Socket, warn: Warn) -> None:
    """Connect without a word; the socket stays under repair."""
    assert record.transmission is not None
    assert record.peer is not None
    transmission = record.transmission
    # Repair has bind overlook who else has the port; so SO_REUSEADDR comes last.
    own = {n: v for n, v in record.options.numbers.items() if n != "SO_REUSEADDR"}
    sockopts.restore(attrs.evolve(record.options, numbers=own), sock, warn, later=True)
    sockopts.set_structs(record.structs, sock, STRUCTS, warn)
    sockopts.set_numbers(record.numbers, sock, NUMBERS, warn)
    sock.setsockopt(SOL_TCP, TCP_REPAIR, TCP_REPAIR_ON)
    sock.bind(record.local.sockaddr)
    fin_sent = int(record.state in FIN_SENT)
    fin_received = int(record.state in FIN_RECEIVED)
    n_written = len(transmission.sent) + len(transmission.unsent)
    set_sequences(
        sock,
        transmission.write_seq - fin_sent - n_written,
        transmission.receive_next - fin_received - len(record.received),
    )
    sock.connect(record.peer.sockaddr)


def _make_alive(
    record: TcpConnectionRecord, transmission: Transmission, sock: Socket, warn: Warn
) -> None:
    _establish(record, sock, warn)
    handshake = transmission.handshake
    set_options(sock, handshake, transmission.max_segment_bytes, transmission.clock)
    _make_room(record, sock)
    fill_queue(sock, TCP_RECV_QUEUE, [record.received])
    fill_queue(sock, TCP_SEND_QUEUE, [transmission.sent])
    fin_received = record.state in FIN_RECEIVED
    window = transmission.window
    sock.setsockopt(SOL_TCP, TCP_REPAIR_WINDOW, _before_fin(window, fin=fin_received).pack())
    _close_sides(record, transmission, sock)
    sock.setsockopt(SOL_TCP, TCP_REPAIR_WINDOW, window.pack())
    sock.setsockopt(SOL_TCP, _TCP_WINDOW_CLAMP, transmission.window_clamp)


def _before_fin(window: Window, *, fin: bool) -> Window:
    """Return a window in which the number of the peer's FIN is still to come."""
    if not fin:
        return window
    return attrs.evolve(
        window,
        receive_wup=(window.receive_wup - 1) & 0xFFFF_FFFF,
        receive_bytes=window.receive_bytes + 1,
        send_wl1=(window.send_wl1 - 1) & 0xFFFF_FFFF,
    )


def _close_sides(record: TcpConnectionRecord, transmission: Transmission, sock: Socket) -> None:
    """Close one or both sides in the order that leads to the state.

    Raises:
        OSError: it does not, since our segment did not arrive.
    """
    state, flow, scope_id = record.state, record.flow, record.local.scope_id
    n_written = len(transmission.sent) + len(transmission.unsent)
    acknowledged = transmission.write_seq - int(state in FIN_SENT) - n_written
    if state == TCP_LAST_ACK:
        send_as_peer(
            flow, FIN | ACK, transmission.receive_next - 1, acknowledged, scope_id=scope_id
        )
    if state in FIN_SENT and not transmission.fin_unsent:
        sock.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
        sock.shutdown(_SHUT_WR)
        sock.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE)
    if state in FIN_RECEIVED - {TCP_LAST_ACK}:
        send_as_peer(
            flow, FIN | ACK, transmission.receive_next - 1, acknowledged, scope_id=scope_id
        )
    if state == TCP_FIN_WAIT2:
        seq = transmission.receive_next
        send_as_peer(flow, ACK, seq, transmission.write_seq, scope_id=scope_id)
    wanted = _WITH_FIN_UNSENT[state] if transmission.fin_unsent else state
    reached = read_info(sock).state
    if reached != wanted:
        raise OSError(
            errno.EPROTO,
            f"a connection is in state {STATES.get(reached, reached)} instead of {STATES[wanted]}:"
            " a packet filter of this host keeps our own segments from it",
        )


_WITH_FIN_UNSENT = {
    TCP_FIN_WAIT1: TCP_ESTABLISHED,
    TCP_CLOSING: TCP_CLOSE_WAIT,
    TCP_LAST_ACK: TCP_CLOSE_WAIT,
}
"""State of the image -> the state until our side is closed, at last."""


def _make_room(record: TcpConnectionRecord, sock: Socket) -> None:
    """Let everything fit into the queues; `_set_buffers` has the last word."""
    assert record.transmission is not None
    n_sent = len(record.transmission.sent) + len(record.transmission.unsent)
    n_received = len(record.received)
    room = _ROOM * max(n_sent, n_received) + _SOME_BYTES
    sock.setsockopt(SOL_SOCKET, _SO_SNDBUFFORCE, max(record.send_buffer_bytes, room))
    sock.setsockopt(SOL_SOCKET, _SO_RCVBUFFORCE, max(record.receive_buffer_bytes, room))


def _set_buffers(record: TcpConnectionRecord, sock: Socket, warn: Warn) -> None:
    """Give both buffers the sizes they had, and leave to the kernel what it has chosen itself."""
    sock.setsockopt(SOL_SOCKET, _SO_SNDBUFFORCE, record.send_buffer_bytes)
    sock.setsockopt(SOL_SOCKET, _SO_RCVBUFFORCE, record.receive_buffer_bytes)
    try:
        sock.setsockopt(SOL_SOCKET, _SO_BUF_LOCK, record.buffer_locks)
    except OSError:
        warn("the buffers of a TCP connection keep the sizes they have (SO_BUF_LOCK is missing)")


def _finish_later(record: TcpConnectionRecord, sock: Socket, hold: RestoreHold, warn: Warn) -> None:
    """End the repair when all processes stand and the packets are let through."""
    kept = Socket(fileno=duplicate(sock.fileno()))
    hold.at_end.append(kept.close)
    hold.at_last.append(lambda: _finish(record, kept, warn))


def _finish(record: TcpConnectionRecord, sock: Socket, warn: Warn) -> None:
    assert record.transmission is not None
    sock.setsockopt(SOL_TCP, TCP_REPAIR, TCP_REPAIR_OFF)
    sock.setsockopt(SOL_SOCKET, SO_REUSEADDR, record.options.numbers.get("SO_REUSEADDR", 0))
    left = memoryview(record.transmission.unsent)
    while left:
        left = left[sock.send(left, _MSG_DONTWAIT) :]
    if record.transmission.fin_unsent:
        sock.shutdown(_SHUT_WR)
    if record.reads_no_more:
        sock.shutdown(_SHUT_RD)
    _set_buffers(record, sock, warn)
    sockopts.restore_last(record.options, sock, warn)
    sock.close()


def _make_ended(record: TcpConnectionRecord, sock: Socket, warn: Warn) -> None:
    """Connect to a socket of ours, and have that end it."""
    received = record.received if record.state == TCP_CLOSE else b""
    lasting = {n: v for n, v in record.options.structs.items() if n != "SO_BINDTODEVICE"}
    sockopts.set_structs(lasting, sock, sockopts.STRUCTS, warn)
    sockopts.set_structs(record.structs, sock, STRUCTS, warn)
    sockopts.set_numbers(record.options.numbers, sock, sockopts.NUMBERS, warn)
    sockopts.set_numbers(record.numbers, sock, NUMBERS, warn)
    sock.setsockopt(SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM * len(received) + _SOME_BYTES)
    with _listening(record.local.family) as listener:
        sock.connect(listener.getsockname())
        peer, _ = listener.accept()
        with peer:
            peer.setsockopt(SOL_SOCKET, _SO_SNDBUFFORCE, _ROOM * len(received) + _SOME_BYTES)
            peer.sendall(received)
            _wait_until_received(sock, len(received))
            peer.setsockopt(SOL_SOCKET, _SO_LINGER, _RESET_AT_ONCE)
    if record.state == TCP_CLOSE and not record.has_error:
        sock.getsockopt(SOL_SOCKET, _SO_ERROR)
    _set_buffers(record, sock, warn)
    sockopts.restore_last(record.options, sock, warn)


def _listening(family: int) -> "socket.socket":
    """Return a socket of the loopback that takes connections."""
    import socket

    listener = socket.socket(family, inet.SOCK_STREAM, inet.IPPROTO_TCP)
    listener.bind(("::1" if family == inet.AF_INET6 else "127.0.0.1", 0))
    listener.listen(1)
    return listener


def _wait_until_received(sock: Socket, n_bytes: int) -> None:
    """Wait until the loopback has brought everything; a reset would drop what is on its way."""
    until = time.monotonic() + _LOOPBACK_S
    while count_bytes(sock, termios.FIONREAD) < n_bytes:
        if time.monotonic() > until:
            raise OSError(errno.ETIMEDOUT, "what a connection had received does not fit anew")
