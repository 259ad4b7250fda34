"""A datagram of UDP or UDP-Lite in the name of its sender: how a queue is filled again.

Source: RFC 768, RFC 3828 (whose length field tells how much is summed: 0 is all).
"""

import struct

from ckpt.kernel.nftables import Flow
from ckpt.kernel.raw_ip import send_packet, sum_with

_IPPROTO_UDP = 17
_UDP = struct.Struct("!HHHH")
_NO_SUM = 0xFFFF
"""What is written for a sum of 0, which would say that there is none."""


def send_datagram(flow: Flow, protocol: int, data: bytes, *, scope_id: int = 0) -> None:
    """Send a datagram from the peer of a flow to our side of it.

    State: the socket is bound; when this returns it has the datagram, or has dropped it.

    Raises:
        OSError: no CAP_NET_RAW, or no way to the address.
    """
    length = _UDP.size + len(data) if protocol == _IPPROTO_UDP else 0
    head = (flow.peer_port, flow.local_port, length)
    total = sum_with(protocol, flow.peer, flow.local, _UDP.pack(*head, 0) + data) or _NO_SUM
    datagram = _UDP.pack(*head, total) + data
    send_packet(flow.family, protocol, flow.peer, flow.local, datagram, scope_id)
