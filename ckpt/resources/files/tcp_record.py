"""What an image holds of a TCP connection, and its options; see `tcp_connection`."""

from typing import Final

import attrs

from ckpt.kernel.nftables import Flow
from ckpt.kernel.tcp_repair import (
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_CLOSING,
    TCP_ESTABLISHED,
    TCP_FIN_WAIT1,
    TCP_FIN_WAIT2,
    TCP_LAST_ACK,
    Info,
    Window,
)
from ckpt.resources.files import inet
from ckpt.resources.files.inet import InetAddress, flow_between
from ckpt.resources.files.sockopts import Numbers, SocketOptions, Structs, refuse_unknown

_TCP = inet.IPPROTO_TCP

NUMBERS: Numbers = dict(inet.NUMBERS) | {
    "TCP_NODELAY": (_TCP, 1),
    "TCP_CORK": (_TCP, 3),
    "TCP_KEEPIDLE": (_TCP, 4),
    "TCP_KEEPINTVL": (_TCP, 5),
    "TCP_KEEPCNT": (_TCP, 6),
    "TCP_SYNCNT": (_TCP, 7),
    "TCP_LINGER2": (_TCP, 8),
    "TCP_THIN_LINEAR_TIMEOUTS": (_TCP, 16),
    "TCP_USER_TIMEOUT": (_TCP, 18),
    "TCP_NOTSENT_LOWAT": (_TCP, 25),
    "TCP_INQ": (_TCP, 36),
    "TCP_TX_DELAY": (_TCP, 37),
    "TCP_RTO_MAX_MS": (_TCP, 44),
    "TCP_RTO_MIN_US": (_TCP, 45),
    "TCP_DELACK_MAX_US": (_TCP, 46),
}
STRUCTS: Structs = dict(inet.STRUCTS) | {"TCP_CONGESTION": (_TCP, 13, 16)}

STATES: Final = {
    TCP_ESTABLISHED: "established",
    TCP_FIN_WAIT1: "FIN_WAIT1",
    TCP_FIN_WAIT2: "FIN_WAIT2",
    TCP_CLOSE_WAIT: "CLOSE_WAIT",
    TCP_LAST_ACK: "LAST_ACK",
    TCP_CLOSING: "CLOSING",
    TCP_CLOSE: "ended",
}
"""Those that a connection can be in; ended is one with an owner still, but no peer."""
FIN_SENT: Final = frozenset({TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_LAST_ACK, TCP_CLOSING})
"""We have closed our side: a FIN has a number behind all that was written."""
FIN_UNACKNOWLEDGED: Final = FIN_SENT - {TCP_FIN_WAIT2}
FIN_RECEIVED: Final = frozenset({TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING})
"""The peer has closed its side: its FIN has a number behind all that came."""


@attrs.frozen(slots=True, repr=False)
class Transmission:
    """The protocol's side of a connection; of an ended one there is none."""

    write_seq: int
    """The number of the next byte to be written; behind our FIN if there is one."""
    receive_next: int
    """The number of the next byte to come; behind the peer's FIN if there is one."""
    sent: bytes
    """What the peer has not acknowledged."""
    unsent: bytes
    """What was written after that, and never sent."""
    fin_unsent: bool
    """Our side was closed, and the peer was not told yet."""
    window: Window
    handshake: Info
    """What both sides had agreed on."""
    clock: int
    """Our time stamps, see `kernel.tcp_repair.Repaired`."""
    max_segment_bytes: int
    window_clamp: int
    """TCP_WINDOW_CLAMP."""
    hold: str
    """The table of nf_tables that a dump with `kill` has left; "" for none."""


@attrs.frozen(slots=True, repr=False)
class TcpConnectionRecord:
    """A connection, or what is left of one."""

    state: int
    """One of `STATES`."""
    local: InetAddress
    peer: InetAddress | None
    """None if it has ended."""
    received: bytes
    """What has come and was not read."""
    has_error: bool
    """An ended one: the next call is to report that."""
    reads_no_more: bool
    """shutdown(2) with SHUT_RD; not by the peer's FIN."""
    transmission: Transmission | None
    options: SocketOptions
    numbers: dict[str, int]
    """Option name -> value, those of `NUMBERS`."""
    structs: dict[str, bytes]
    """Option name -> value, those of `STRUCTS`."""
    send_buffer_bytes: int
    """As it is, whoever has chosen it."""
    receive_buffer_bytes: int
    buffer_locks: int
    """SO_BUF_LOCK: which of the two the program has chosen."""

    def __attrs_post_init__(self) -> None:
        """Refuse what is no connection."""
        if self.state not in STATES:
            raise ValueError(f"a connection cannot be in state {self.state}")
        refuse_unknown(self.numbers, NUMBERS)
        refuse_unknown(self.structs, STRUCTS)
        lives = self.state != TCP_CLOSE
        if lives != (self.peer is not None) or lives != (self.transmission is not None):
            raise ValueError("a connection has a peer and a transmission as long as it lives")
        if self.peer is not None and self.peer.family != self.local.family:
            raise ValueError("both ends of a connection have addresses of one family")

    @property
    def path(self) -> str:
        """What a user calls it."""
        peer = self.peer.where if self.peer else "nobody"
        return f"TCP {self.local.where} to {peer}"

    @property
    def flow(self) -> Flow:
        """What its packets look like."""
        assert self.peer is not None
        return flow_between(self.local, self.peer)
