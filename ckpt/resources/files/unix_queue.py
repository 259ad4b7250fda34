"""What waits to be read in a unix socket: looked at without taking it out, and put in again.

    stream       one run of bytes; cut only where the writer changes (SO_PASSCRED)
    seqpacket    packets; the kernel tells how many bytes in all
    dgram        packets with their senders' names; nobody tells how many

Packets behind the first are seen by MSG_PEEK with SO_PEEK_OFF, which is put back as it was. A
packet of no bytes is seen so only once: the kernel marks it, and skips it from then on.

Kernel: unix(7), recv(2) MSG_PEEK, socket(7) SO_PEEK_OFF, `__skb_try_recv_from_queue`.
"""

import contextlib
import errno
import functools
import os
import select
import struct
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from _socket import socketpair
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import attrs

from ckpt.process.stand_in import Identity, act
from ckpt.resources.files.unix_passed import Passed
from ckpt.units import Fd

SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET = 1, 2, 5
_AF_UNIX, _SOL_SOCKET = 1, 1
_SO_SNDBUF, _SO_SNDBUFFORCE, _SO_PEEK_OFF, _SO_BUF_LOCK = 7, 32, 42, 72
_SCM_RIGHTS, _SCM_CREDENTIALS, _SCM_PIDFD = 1, 2, 4
_MSG_TRUNC, _MSG_DONTWAIT, _MSG_NOSIGNAL = 0x20, 0x40, 0x4000
_LOOK = 0x2 | _MSG_DONTWAIT | 0x4000_0000
"""MSG_PEEK; MSG_CMSG_CLOEXEC."""
_SO_MEMINFO, _WMEM_ALLOC = 55, 2
_MEMINFO = struct.Struct("=4I")
_UCRED = struct.Struct("=iII")
_CONTROL_BYTES = 8192
"""More than 253 descriptors (SCM_MAX_FD), credentials, a label and a pidfd need."""
_FIRST_BYTES = 1 << 16
_PLENTY_BYTES = 1 << 29


@attrs.frozen(slots=True, repr=False)
class Message:
    """One packet, or a run of bytes of one writer."""

    data: bytes
    source: bytes
    """The sender's name; empty if it has none, or for what is connected."""
    pid: int
    """Of the sender; 0 if the kernel did not note who it was."""
    uid: int
    gid: int
    passed: tuple[Passed, ...] = ()
    """The descriptors that come with it, in order."""

    def __attrs_post_init__(self) -> None:
        """Refuse a sender that cannot be."""
        Identity(self.pid, self.uid, self.gid)


Describe = Callable[[Fd], Passed]
"""Tells what a descriptor is that a look has given us; it is closed afterwards."""


def peek(
    sock: Socket, kind: int, total_bytes: int, describe: Describe, *, is_ended: bool
) -> Iterator[Message]:
    """Yield what waits in a socket of the target, without taking it out.

    State: the target is frozen.

    Args:
        sock: shares the target's description.
        kind: SOCK_STREAM ...
        total_bytes: what the kernel says is there (of a datagram socket: in the first packet).
        describe: is asked for each descriptor in flight.
        is_ended: whether no more can come, which reads like a packet of no bytes.

    Raises:
        NotPassable: a descriptor in flight cannot be captured.
        OSError: it cannot be looked at.
    """
    if kind != SOCK_DGRAM and not total_bytes and (is_ended or kind == SOCK_STREAM):
        return
    if not is_readable(sock):
        return
    if kind == SOCK_STREAM and sock.getsockopt(_SOL_SOCKET, _SO_PEEK_OFF) < 0:
        with _read_one(sock, total_bytes, offset=-1) as seen:
            if seen and len(seen.message.data) == total_bytes and not seen.fds:
                yield seen.message
                return
    with _peeking(sock):
        yield from _iter_messages(sock, kind, total_bytes, describe, is_ended=is_ended)


def is_readable(sock: Socket) -> bool:
    """Tell whether there is anything, an end included."""
    return bool(poll(sock) & select.POLLIN)


def poll(sock: Socket) -> int:
    """Return the events of a socket (POLLIN, POLLPRI, POLLERR ...) without waiting."""
    asked = select.poll()
    asked.register(sock.fileno(), select.POLLIN | select.POLLPRI)
    return dict(asked.poll(0)).get(sock.fileno(), 0)


def _iter_messages(
    sock: Socket, kind: int, total_bytes: int, describe: Describe, *, is_ended: bool
) -> Iterator[Message]:
    offset = 0
    while kind == SOCK_DGRAM or offset < total_bytes or not (is_ended or kind == SOCK_STREAM):
        with _read_one(sock, _FIRST_BYTES, offset=offset) as seen:
            if seen is None or (kind == SOCK_STREAM and not seen.message.data):
                break
            passed = tuple(describe(fd) for fd in seen.fds)
            yield attrs.evolve(seen.message, passed=passed) if passed else seen.message
        offset += len(seen.message.data)


@contextlib.contextmanager
def _peeking(sock: Socket) -> Iterator[None]:
    """Have each MSG_PEEK go on where the last one ended."""
    before = sock.getsockopt(_SOL_SOCKET, _SO_PEEK_OFF)
    sock.setsockopt(_SOL_SOCKET, _SO_PEEK_OFF, 0)
    try:
        yield
    finally:
        sock.setsockopt(_SOL_SOCKET, _SO_PEEK_OFF, before)


@attrs.frozen(slots=True, eq=False, repr=False)
class _Seen:
    """What one look has shown."""

    message: Message
    fds: list[Fd]


@contextlib.contextmanager
def _read_one(sock: Socket, size: int, *, offset: int) -> Iterator[_Seen | None]:
    """Lend the message at an offset (the first one for -1), however long; None if none is."""
    flags = _MSG_TRUNC
    fds: list[Fd] = []
    try:
        while flags & _MSG_TRUNC:
            _close_all(fds)
            try:
                data, control, flags, source = sock.recvmsg(size, _CONTROL_BYTES, _LOOK)
            except BlockingIOError:
                yield None
                return
            sender = _read_control(control, fds)
            if flags & _MSG_TRUNC:
                size *= 4
                if offset >= 0:
                    sock.setsockopt(_SOL_SOCKET, _SO_PEEK_OFF, offset)
        yield _Seen(Message(data, to_name(source), *sender), fds)
    finally:
        _close_all(fds)


def _read_control(control: Iterable[tuple[int, int, bytes]], fds: list[Fd]) -> tuple[int, int, int]:
    """Return who sent a message; take the descriptors that it brings."""
    sender = (0, 0, 0)
    for level, kind, value in control:
        if level != _SOL_SOCKET:
            continue
        if kind == _SCM_CREDENTIALS:
            sender = _UCRED.unpack(value)
        elif kind in (_SCM_RIGHTS, _SCM_PIDFD):
            brought = [Fd(fd) for fd in struct.unpack(f"={len(value) // 4}i", value)]
            if kind == _SCM_RIGHTS:
                fds += brought
            else:
                _close_all(brought)
    return sender


def _close_all(fds: list[Fd]) -> None:
    while fds:
        os.close(fds.pop())


def count_unseen(messages: Iterable[Message], kind: int, memory_bytes: int) -> int:
    """Return how many packets of no bytes there must be beside those that can be seen.

    Args:
        messages: what is seen in a queue.
        kind: SOCK_DGRAM or SOCK_SEQPACKET.
        memory_bytes: what their only sender's unread packets occupy; ours are measured against it.
    """
    seen_bytes, each_bytes = _measure(messages, kind)
    unseen, rest = divmod(memory_bytes - seen_bytes, each_bytes)
    return unseen if unseen > 0 and not rest else 0


def are_whole(messages: Iterable[Message], memory_bytes: int) -> bool:
    """Tell whether each of these parts of a stream was sent by one call.

    One read gives what stands before a descriptor together with what brings it, and nothing tells
    where that begins. But each call has cost its sender memory of its own.
    """
    return _measure(messages, SOCK_STREAM)[0] == memory_bytes


def _measure(messages: Iterable[Message], kind: int) -> tuple[int, int]:
    """Return what messages occupy in a pair of ours, and what one of no bytes (of one) does."""
    one, other = socketpair(_AF_UNIX, kind | os.O_CLOEXEC)
    try:
        with roomy(one):
            for message in messages:
                one.send(message.data, _MSG_DONTWAIT)
            seen_bytes = _read_memory(one)
            one.send(b"x" if kind == SOCK_STREAM else b"", _MSG_DONTWAIT)
            return seen_bytes, _read_memory(one) - seen_bytes
    finally:
        one.close()
        other.close()


def _read_memory(sock: Socket) -> int:
    """Return what the unread packets of a sender occupy."""
    values = sock.getsockopt(_SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
    return int(_MEMINFO.unpack(values)[_WMEM_ALLOC])


def to_name(address: object) -> bytes:
    """Return an address as Python gives it as the bytes of `sun_path`."""
    if isinstance(address, bytes):
        return address
    return os.fsencode(address) if isinstance(address, str) else b""


@contextlib.contextmanager
def roomy(sock: Socket) -> Iterator[None]:
    """Let a socket of ours send as much as will be put into queues; as new afterwards."""
    usual = sock.getsockopt(_SOL_SOCKET, _SO_SNDBUF)
    sock.setsockopt(_SOL_SOCKET, _SO_SNDBUFFORCE, _PLENTY_BYTES)
    try:
        yield
    finally:
        sock.setsockopt(_SOL_SOCKET, _SO_SNDBUFFORCE, usual // 2)
        with contextlib.suppress(OSError):
            sock.setsockopt(_SOL_SOCKET, _SO_BUF_LOCK, 0)


def put(
    messages: Iterable[Message],
    sender: Socket,
    target: bytes,
    open_passed: Callable[[Passed], Fd],
) -> None:
    """Send messages from a socket of ours, each as its writer.

    Args:
        messages: in order.
        sender: connected to the socket that they are for, if `target` is empty.
        target: the address of that.
        open_passed: makes a descriptor that a message brings.

    Raises:
        OSError: one does not fit into the queue here.
    """
    for (pid, uid, gid), several in groupby(messages, lambda one: (one.pid, one.uid, one.gid)):
        run = [(message, [open_passed(one) for one in message.passed]) for message in several]
        try:
            _put_run(run, sender, target, Identity(pid, uid, gid))
        finally:
            for _, fds in run:
                _close_all(fds)


_Run = list[tuple[Message, list[Fd]]]


def _put_run(run: _Run, sender: Socket, target: bytes, who: Identity) -> None:
    if who.is_known:
        # One that is no more, and whose number is taken: then it is ours.
        with contextlib.suppress(ProcessLookupError):
            act(functools.partial(_put_all, run, sender, target, who), who)
            return
    _put_all(run, sender, target, None)


def _put_all(run: _Run, sender: Socket, target: bytes, who: Identity | None) -> None:
    flags = _MSG_DONTWAIT | _MSG_NOSIGNAL
    for message, fds in run:
        control = []
        if who:
            credentials = _UCRED.pack(who.pid, who.uid, who.gid)
            control.append((_SOL_SOCKET, _SCM_CREDENTIALS, credentials))
        if fds:
            control.append((_SOL_SOCKET, _SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds)))
        address = (target,) if target else ()
        sent = sender.sendmsg([message.data], control, flags, *address)
        if sent != len(message.data):
            raise OSError(errno.EAGAIN, f"{len(message.data)} bytes do not fit into a queue here")
