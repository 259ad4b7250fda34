"""One hand-made TCP segment, as if the peer had sent it: how a FIN gets into a repaired socket.

Repair sets numbers and queues, but not that the peer has closed its side, nor that it has
acknowledged that we did. So the restored socket is told by a segment of its peer (`raw_ip`).

Source: RFC 9293 (header, checksum).
"""

import struct
from typing import Final

from ckpt.kernel.nftables import Flow
from ckpt.kernel.raw_ip import send_packet, sum_with

_IPPROTO_TCP = 6
_TCP = struct.Struct("!HHIIBBHHH")
_HEADER_WORDS = 5
_WINDOW = 0xFFFF

FIN: Final = 0x01
ACK: Final = 0x10


def send_as_peer(flow: Flow, flags: int, seq: int, acknowledged: int, *, scope_id: int = 0) -> None:
    """Send a bare segment from the peer of a connection to our side of it.

    State: the socket exists; when this returns it has taken the segment.

    Args:
        flow: addresses and ports.
        flags: FIN, ACK.
        seq: the number of the segment, the next that our side waits for.
        acknowledged: the number up to which the peer has everything.
        scope_id: of our address, if that is a link-local one.

    Raises:
        OSError: no CAP_NET_RAW, or no way to the address.
    """
    ports = (flow.peer_port, flow.local_port)
    numbers = (seq & 0xFFFF_FFFF, acknowledged & 0xFFFF_FFFF)
    bare = _TCP.pack(*ports, *numbers, _HEADER_WORDS << 4, flags, _WINDOW, 0, 0)
    total = sum_with(_IPPROTO_TCP, flow.peer, flow.local, bare)
    segment = bare[:16] + struct.pack("!H", total) + bare[18:]
    send_packet(flow.family, _IPPROTO_TCP, flow.peer, flow.local, segment, scope_id)
