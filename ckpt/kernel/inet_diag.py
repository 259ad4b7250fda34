"""What sock_diag tells of TCP connections by their addresses, and the end of what nobody owns.

Source: sock_diag(7), include/uapi/linux/inet_diag.h; SOCK_DESTROY needs CONFIG_INET_DIAG_DESTROY.
"""

import os
import struct
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from typing import Final

from ckpt.kernel.nftables import Flow
from ckpt.kernel.sock_diag import dump

_AF_NETLINK, _NETLINK_SOCK_DIAG, _SOCK_RAW = 16, 4, 3
_IPPROTO_TCP: Final = 6
_SOCK_DESTROY: Final = 21
_REQUEST_AND_ACK: Final = 0x1 | 0x4
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI")
"""`struct inet_diag_req_v2` up to its id: family, protocol, extensions, states."""
_ID = struct.Struct("!HH16s16s12s")
"""`struct inet_diag_sockid`: ports, addresses, interface and cookie."""
_NO_COOKIE: Final = bytes(4) + b"\xff" * 8
_ALL: Final = 0xFFFFFFFF


def read_tcp_state(flow: Flow) -> int | None:
    """Return the state of the connection with these addresses; None if this host has none.

    Raises:
        OSError: others than ENOENT.
    """
    try:
        for payload in dump(_request(flow), 0):
            return payload[1]
    except FileNotFoundError:
        pass
    return None


def destroy_tcp(flow: Flow) -> None:
    """End the connection with these addresses; of TIME_WAIT, without a word to anybody.

    Raises:
        OSError: ENOENT, there is none; EOPNOTSUPP, the kernel cannot; EPERM.
    """
    request = _request(flow)
    sock = Socket(_AF_NETLINK, _SOCK_RAW | os.O_CLOEXEC, _NETLINK_SOCK_DIAG)
    try:
        size = _HEADER.size + len(request)
        sock.send(_HEADER.pack(size, _SOCK_DESTROY, _REQUEST_AND_ACK, 1, 0) + request)
        number = -struct.unpack_from("=i", sock.recv(1 << 12), _HEADER.size)[0]
    finally:
        sock.close()
    if number:
        raise OSError(number, os.strerror(number))


def _request(flow: Flow) -> bytes:
    ends = (flow.local.ljust(16, b"\0"), flow.peer.ljust(16, b"\0"))
    name = _ID.pack(flow.local_port, flow.peer_port, *ends, _NO_COOKIE)
    return _REQUEST.pack(flow.family, _IPPROTO_TCP, 0, _ALL) + name
