"""NETLINK_SOCK_DIAG: what the kernel tells of sockets by their inode numbers.

    struct nlmsghdr      16 bytes: length, type, flags, sequence, port
      struct unix_diag_msg / inet_diag_msg ...
      struct nlattr ...  4 bytes (length, type) and a value, each padded to 4

`dump` makes one request and yields the answers' payloads, for every family; the readers of a
family stand below it. Only sockets of our own network namespace are told of.

Source: sock_diag(7), netlink(7), include/uapi/linux/{netlink,sock_diag,unix_diag}.h.
"""

import os
import struct
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Generator, Iterator
from typing import Final

import attrs

_AF_NETLINK: Final = 16
_AF_UNIX: Final = 1
_SOCK_RAW: Final = 3
_NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
NLM_F_REQUEST: Final = 0x1
NLM_F_DUMP: Final = 0x300
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_TYPE_MASK: Final = 0x3FFF
_ANSWER_BYTES: Final = 1 << 18


def dump(request: bytes, flags: int = NLM_F_DUMP) -> Iterator[memoryview]:
    """Make one SOCK_DIAG_BY_FAMILY request; yield the payload of each answer.

    Args:
        request: what follows the netlink header, `struct unix_diag_req` for one.
        flags: of the netlink header; 0 asks for one socket.

    Raises:
        OSError: ENOENT, no such socket, or a kernel without the family's module; EINVAL, ...
    """
    sock = Socket(_AF_NETLINK, _SOCK_RAW | os.O_CLOEXEC, _NETLINK_SOCK_DIAG)
    try:
        length = _HEADER.size + len(request)
        sock.send(_HEADER.pack(length, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | flags, 1, 0) + request)
        going_on = True
        while going_on:
            going_on = yield from _iter_payloads(sock.recv(_ANSWER_BYTES), flags)
    finally:
        sock.close()


def _iter_payloads(answer: bytes, flags: int) -> Generator[memoryview, None, bool]:
    """Yield the payloads of one read; return whether more will come."""
    view = memoryview(answer)
    while len(view) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(view)
        payload = view[_HEADER.size : length]
        if kind == _NLMSG_DONE:
            return False
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", payload)[0]
            raise OSError(number, os.strerror(number))
        yield payload
        view = view[_padded(length) :]
    return bool(flags & NLM_F_DUMP)


def _padded(length: int) -> int:
    return (length + 3) & ~3


def parse_attributes(data: memoryview) -> dict[int, bytes]:
    """Return the netlink attributes behind a message: type -> value."""
    found: dict[int, bytes] = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = bytes(data[_ATTRIBUTE.size : length])
        data = data[_padded(length) :]
    return found


_UNIX_REQUEST: Final = struct.Struct("=BBHIIIII")
"""`struct unix_diag_req`: family, protocol, pad, states, inode, show, cookie."""
_UNIX_MESSAGE: Final = struct.Struct("=BBBBIII")
"""`struct unix_diag_msg`: family, type, state, pad, inode, cookie."""
_UDIAG_SHOW: Final = 0x01 | 0x02 | 0x04 | 0x08 | 0x10
"""UDIAG_SHOW_NAME | VFS | PEER | ICONS | RQLEN; UNIX_DIAG_SHUTDOWN comes always."""
_NAME, _VFS, _PEER, _ICONS, _RQLEN, _SHUTDOWN = 0, 1, 2, 3, 4, 6
_ALL: Final = 0xFFFFFFFF
TCP_ESTABLISHED: Final = 1
TCP_CLOSE: Final = 7
TCP_LISTEN: Final = 10
"""States of unix sockets, too."""


@attrs.frozen(slots=True, repr=False)
class UnixSocket:
    """What the kernel tells of one unix socket."""

    inode: int
    kind: int
    """SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET."""
    state: int
    name: bytes
    """A path, or a zero byte and an abstract name; empty if it has none."""
    file: int
    """The lower 32 bits of its file's inode number; 0 if its name is none of a file."""
    peer: int | None
    """Inode of the other end: None if it was never connected, 0 if that has no inode (it has gone,
    or was not accepted yet)."""
    waiting: tuple[int, ...]
    """Inodes of those that wait to be accepted, first come first; 0 for one that has gone."""
    receive_queue: int
    """Bytes to be read (of a datagram socket: in the first message); waiting connections of a
    listening socket."""
    send_queue: int
    """Memory of what it has sent and nobody has read; the backlog of a listening socket."""
    shutdown: int
    """1: reads no more, 2: writes no more."""

    @property
    def listens(self) -> bool:
        """Tell whether it takes connections."""
        return self.state == TCP_LISTEN


def read_unix_sockets() -> dict[int, UnixSocket]:
    """Return all unix sockets of our network namespace, by inode number.

    Raises:
        OSError: ENOENT, the kernel has no unix_diag.
    """
    request = _UNIX_REQUEST.pack(_AF_UNIX, 0, 0, _ALL, 0, _UDIAG_SHOW, _ALL, _ALL)
    return {one.inode: one for one in map(_parse_unix, dump(request))}


def _parse_unix(payload: memoryview) -> UnixSocket:
    _, kind, state, _, inode, _, _ = _UNIX_MESSAGE.unpack_from(payload)
    values = parse_attributes(payload[_UNIX_MESSAGE.size :])
    name = values.get(_NAME, b"")
    received, sent = struct.unpack("=II", values.get(_RQLEN, bytes(8)))
    waiting = values.get(_ICONS, b"")
    return UnixSocket(
        inode=inode,
        kind=kind,
        state=state,
        name=name if name[:1] == b"\0" else name.rstrip(b"\0"),
        file=int.from_bytes(values.get(_VFS, b"")[:4], "little"),
        peer=int.from_bytes(values[_PEER], "little") if _PEER in values else None,
        waiting=struct.unpack(f"={len(waiting) // 4}I", waiting),
        receive_queue=received,
        send_queue=sent,
        shutdown=values.get(_SHUTDOWN, b"\0")[0],
    )
