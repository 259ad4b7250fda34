"""TCP connections: established, half closed in every way, or ended; the peer notices nothing.

    received        what has come and was not read ────────────┐  all read by TCP_REPAIR, while
    sent, unsent    written: not acknowledged; never sent ─────┤  the packets of the connection
    numbers, window, what the handshake had settled ───────────┘  are held (`network_hold`)

    restore   repair, bind, numbers, connect    nothing is sent: it is established at once
              options, queues, window           our FIN is put into the queue by shutdown(2),
                                                the peer's comes as a segment made by hand
    at last   the hold ends, repair ends, what was never sent is written

A connection that a dump without `kill` has captured lives on: it cannot be restored while it does,
nor when its peer has gone on with it meanwhile (if both ends are in one tree, none has). With
`--tcp-close` it comes back as if the peer had reset it. So does one that had ended: its queue and
its error are kept, its addresses are others.

Kernel: tcp(7), `kernel/tcp_repair`, `kernel/tcp_segment`, SIOCINQ, SIOCOUTQ, SIOCOUTQNSD.

Refused before the target is stopped: connections under way (SYN_SENT), urgent data that was not
read, kernel TLS, filters of eBPF, other network namespaces, connections that a process outside the
tree has open too. Not kept: explicit congestion
notification, what congestion control has learned, segments out of order (they are sent again),
the error queue, keys of TCP_MD5SIG and TCP-AO (not seen).
"""

import errno
import select
import termios
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterator

from ckpt.errors import NotPermitted
from ckpt.kernel.tcp_repair import (
    TCP_CLOSE,
    TCP_ESTABLISHED,
    TCP_FIN_WAIT1,
    TCP_FIN_WAIT2,
    TCP_LISTEN,
    TCP_SYN_RECV,
    TCP_SYN_SENT,
    Info,
    count_bytes,
    read_connection,
    read_info,
)
from ckpt.process.remote import Reply
from ckpt.resources.base import RestoreOptions
from ckpt.resources.files import inet, network_space, sockopts, tcp_rebuild
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.inet import InetAddress, address_of, flow_between, peer_of
from ckpt.resources.files.kind import Kind
from ckpt.resources.files.network_hold import dump_hold, note_connection
from ckpt.resources.files.network_space import borrow_beside, nature_of
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.resources.files.sockopts import borrow_socket
from ckpt.resources.files.tcp import matches
from ckpt.resources.files.tcp_record import (
    FIN_UNACKNOWLEDGED,
    NUMBERS,
    STRUCTS,
    TcpConnectionRecord,
    Transmission,
)

_FAMILIES = (inet.AF_INET, inet.AF_INET6)
_SOL, _TCP = sockopts.SOL_SOCKET, inet.IPPROTO_TCP
_SO_REUSEADDR, _SO_SNDBUF, _SO_RCVBUF, _SO_BUF_LOCK = 2, 7, 8, 72
_TCP_WINDOW_CLAMP, _TCP_ULP, _TCP_REPAIR = 10, 31, 19
_SIOCOUTQNSD = 0x894B
_UNDER_WAY = frozenset({TCP_SYN_SENT, TCP_SYN_RECV})
_WITHOUT_FIN = frozenset({TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2})


def is_for(file: OpenFile, table: FdTable) -> bool:
    """See `Kind.is_for`: not what `tcp` takes, sockets that never had a peer."""
    nature = nature_of(file, table)
    if nature.family not in _FAMILIES or nature.protocol != _TCP:
        return False
    with borrow_socket(file, table) as sock:
        return not is_unconnected(sock, read_info(sock))


def is_unconnected(sock: Socket, info: Info) -> bool:
    """Tell whether a TCP socket listens, or has had no peer since it was made or disconnected."""
    if info.state == TCP_LISTEN:
        return True
    ended = bool(_events(sock) & select.POLLRDHUP) or info.segments_out > 0
    return info.state == TCP_CLOSE and not ended


def _events(sock: Socket) -> int:
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP | select.POLLPRI)
    return dict(poll.poll(0)).get(sock.fileno(), 0)


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    # Asked before the socket is borrowed: then we would have it, too.
    holder = table.links_elsewhere.get(file.link) if table.running else None
    with borrow_beside(file, table) as sock:
        what = f"is a TCP connection{_peer_name(sock)}"
        state = read_info(sock).state
        if sockopts.has_value(sock, _TCP, _TCP_ULP):
            return Problem(f"{what} with an upper layer (TLS), which is not supported yet")
        if table.tree.options.tcp_close or state == TCP_CLOSE:
            return network_space.problem(sock, table) or sockopts.problem(sock)
        if holder is not None:
            return Problem(
                f"{what} that process {holder} has open too",
                "take a process that both descend from, or use --tcp-close",
            )
        if state in _UNDER_WAY:
            return Problem(f"{what} that is being made", "wait until it is, or use --tcp-close")
        if _events(sock) & select.POLLPRI:
            return Problem(
                f"{what} with urgent data that was not read, which is not supported yet",
                "use --tcp-close",
            )
        if table.running and not _may_repair():
            return Problem(
                f"{what}, which needs CAP_NET_ADMIN to be kept", "run ckpt as root, or --tcp-close"
            )
        found = network_space.problem(sock, table) or sockopts.problem(sock)
        peer = peer_of(sock)
        if table.running and peer is not None and found is None:
            local = address_of(sock.family, sock.getsockname())
            note_connection(table.tree, flow_between(local, peer))
        return found


def _peer_name(sock: Socket) -> str:
    peer = peer_of(sock)
    return f" to {peer.host} port {peer.port}" if peer else ""


def _may_repair() -> bool:
    """Ask on a socket of our own."""
    with sockopts.new_socket(inet.AF_INET, inet.SOCK_STREAM) as sock:
        return sockopts.number_of(sock, _TCP, _TCP_REPAIR) is not None and _set_repair(sock)


def _set_repair(sock: Socket) -> bool:
    try:
        sock.setsockopt(_TCP, _TCP_REPAIR, 1)
    except OSError:
        return False
    return True


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> TcpConnectionRecord:
    """See `Kind.capture`.

    Raises:
        NotPermitted, FeatureMissing: the network cannot be held here.
    """
    with borrow_beside(file, table) as sock:
        peer = None if table.tree.options.tcp_close else peer_of(sock)
        if peer is None or read_info(sock).state == TCP_CLOSE:
            return _capture_ended(sock, keeps_queue=not table.tree.options.tcp_close)
        local = address_of(sock.family, sock.getsockname())
        hold = dump_hold(table.tree)
        hold.hold(flow_between(local, peer), (table.pid, file.fd))
        # What was on its way until now may have ended it.
        if read_info(sock).state == TCP_CLOSE:
            return _capture_ended(sock, keeps_queue=True)
        return _capture_alive(sock, local, peer, hold.name)


def _capture_alive(
    sock: Socket, local: InetAddress, peer: InetAddress, hold: str
) -> TcpConnectionRecord:
    handshake = read_info(sock)
    state = handshake.state
    fin = int(state in FIN_UNACKNOWLEDGED)
    n_unsent = count_bytes(sock, _SIOCOUTQNSD)
    fin_unsent = bool(fin and n_unsent)
    n_unsent -= int(fin_unsent)
    reuse = sock.getsockopt(_SOL, _SO_REUSEADDR)
    window_clamp = sock.getsockopt(_TCP, _TCP_WINDOW_CLAMP)
    reads_no_more = state in _WITHOUT_FIN and bool(_events(sock) & select.POLLRDHUP)
    try:
        read = read_connection(
            sock,
            count_bytes(sock, termios.TIOCOUTQ) - fin,
            count_bytes(sock, termios.FIONREAD),
            reuse_address=reuse,
        )
    except PermissionError as error:
        raise NotPermitted(
            "read TCP connections", "run ckpt as root or with CAP_NET_ADMIN, or use --tcp-close"
        ) from error
    n_sent = len(read.sent) - n_unsent
    transmission = Transmission(
        write_seq=read.write_seq,
        receive_next=read.receive_next,
        sent=read.sent[:n_sent],
        unsent=read.sent[n_sent:],
        fin_unsent=fin_unsent,
        window=read.window,
        handshake=handshake,
        clock=read.clock,
        max_segment_bytes=read.max_segment_bytes,
        window_clamp=window_clamp,
        hold=hold,
    )
    return _record(
        sock,
        state=state,
        local=local,
        peer=peer,
        received=read.received,
        has_error=False,
        reads_no_more=reads_no_more,
        transmission=transmission,
    )


def _capture_ended(sock: Socket, *, keeps_queue: bool) -> TcpConnectionRecord:
    """Take what a program can still have of a connection without a peer."""
    received = _peek(sock) if keeps_queue else b""
    return _record(
        sock,
        state=TCP_CLOSE,
        local=address_of(sock.family, sock.getsockname()),
        peer=None,
        received=received,
        has_error=not keeps_queue or bool(_events(sock) & select.POLLERR),
        reads_no_more=False,
        transmission=None,
    )


def _peek(sock: Socket) -> bytes:
    n_bytes = count_bytes(sock, termios.FIONREAD)
    if not n_bytes:
        return b""
    return sock.recv(n_bytes, _MSG_PEEK | _MSG_DONTWAIT)


_MSG_PEEK, _MSG_DONTWAIT = 2, 0x40


def _record(
    sock: Socket,
    *,
    state: int,
    local: InetAddress,
    peer: InetAddress | None,
    received: bytes,
    has_error: bool,
    reads_no_more: bool,
    transmission: Transmission | None,
) -> TcpConnectionRecord:
    """Add the options, which every connection has."""
    return TcpConnectionRecord(
        state=state,
        local=local,
        peer=peer,
        received=received,
        has_error=has_error,
        reads_no_more=reads_no_more,
        transmission=transmission,
        options=sockopts.capture(sock),
        numbers=sockopts.read_numbers(sock, NUMBERS),
        structs=sockopts.read_structs(sock, STRUCTS),
        # The kernel doubles what it is told, to have room for its own records.
        send_buffer_bytes=sock.getsockopt(_SOL, _SO_SNDBUF) // 2,
        receive_buffer_bytes=sock.getsockopt(_SOL, _SO_RCVBUF) // 2,
        buffer_locks=sockopts.number_of(sock, _SOL, _SO_BUF_LOCK) or 0,
    )


_REMEDIES = {
    errno.EADDRNOTAVAIL: "end who has it, or give this host the address; or use --tcp-close",
    errno.EADDRINUSE: "end who has it, or use --tcp-close",
    errno.EPERM: "run ckpt as root or with CAP_NET_ADMIN, or use --tcp-close",
}


def check_files(
    record: TcpConnectionRecord, _flags: int, options: RestoreOptions
) -> Iterator[Problem]:
    """See `Kind.check_files`: try to have the connection, and let go of it without a word."""
    if record.transmission is None or options.tcp_close:
        return
    try:
        tcp_rebuild.try_connection(record)
    except OSError as error:
        yield Problem(
            f"cannot be had here ({_reason(record, error)})",
            _REMEDIES.get(error.errno or 0, ""),
            wants_address=_lacks_address(record, error),
        )


def _lacks_address(record: TcpConnectionRecord, error: OSError) -> bool:
    return error.errno == errno.EADDRNOTAVAIL and not tcp_rebuild.has_address(record.local)


def _reason(record: TcpConnectionRecord, error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL and not _lacks_address(record, error):
        return "the address is in use: the connection lives, or has just ended"
    return error.strerror or str(error)


def describe(record: TcpConnectionRecord) -> str:
    """See `Kind.describe`."""
    return f"{record.local.where}->{record.peer.where if record.peer else '?'}"


TCP_CONNECTION = Kind(
    "tcp connection",
    TcpConnectionRecord,
    matches=matches,
    is_for=is_for,
    problem=problem,
    capture=capture,
    check_files=check_files,
    expect=tcp_rebuild.expect,
    open=tcp_rebuild.open_again,
    describe=describe,
)
"""Must stand before `tcp` among the kinds, which names what is wrong with all other sockets."""
