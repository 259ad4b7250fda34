"""`ckpt receive --stdio`: one session over standard input and output, as ssh has started us.

A further connection is another ssh and another of us: that one finds the session's process by a
socket in the file system, named by the session, where only the same user gets in; hands it the two
streams; and stays until they are closed, because ssh ends when it does. Neighbours: `ssh` is the
other end, `listen` the same for TCP.
"""

import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

from ckpt.errors import ConnectFailed, HostFull, PeerLost
from ckpt.migrate.channel import Channel, Patience
from ckpt.migrate.handshake import (
    NEW_SESSION,
    PREFACE_BYTES,
    Pairing,
    answer,
    make_ticket,
    parse_preface,
)
from ckpt.migrate.session import Handler, Session
from ckpt.migrate.transport import FdTransport, Transport
from ckpt.tracker.epoch import STATE_DIR

_PASS_ON_S = 5.0

_CREDENTIALS = struct.Struct("3i")


def serve_stdio(
    handler: Handler, *, patience: Patience | None = None, directory: Path = STATE_DIR
) -> int:
    """Be one session, or one further connection of a session; return the exit code.

    Standard input is empty and standard output leads to standard error from here on, whatever
    prints. Sessions of ours are found in `directory`.

    Raises:
        ConnectFailed, NotTrusted, PeerVersion, PeerLost, ProtocolError: no session came about.
        CkptError: what the handler raises; the sender was told.
    """
    return _serve(_steal_streams(), handler, patience or Patience(), directory)


def _steal_streams() -> FdTransport:
    """Return standard input and output as a transport, and put harmless ones in their place."""
    sys.stdout.flush()
    in_fd, out_fd = os.dup(0), os.dup(1)
    null_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null_fd, 0)
    os.dup2(2, 1)
    os.close(null_fd)
    return FdTransport(in_fd, out_fd, "the sender")


def _serve(transport: FdTransport, handler: Handler, patience: Patience, directory: Path) -> int:
    session_id = _read_preface(transport, patience.handshake_s)
    if session_id != NEW_SESSION and _pass_on(transport, directory / _name(session_id)):
        return 0
    channel = Channel(transport, patience=patience)
    ticket = make_ticket()
    with _doors_in(directory / _name(ticket.session_id)) as doors:
        # A session that is not here is refused in this: `Hello` names it too.
        answer(channel, ticket, Pairing())
        with Session(ticket, Pairing(), channel, doors) as session:
            return handler(session)


def _name(session_id: bytes) -> str:
    return f"{session_id.hex()}.session"


def _read_preface(transport: Transport, timeout_s: float) -> bytes:
    ends_s = time.monotonic() + timeout_s
    data = bytearray(PREFACE_BYTES)
    n_read = 0
    while n_read < len(data):
        came = transport.read_into(memoryview(data)[n_read:], max(0.0, ends_s - time.monotonic()))
        if not came:
            raise PeerLost(peer=transport.peer, reason="it said nothing")
        n_read += came
    try:
        return parse_preface(bytes(data))
    except ValueError as error:
        raise ConnectFailed(peer=transport.peer, reason=str(error)) from error


def _pass_on(transport: FdTransport, path: Path) -> bool:
    """Hand our streams to the session behind `path` and wait for their end; False: no session."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as session:
        session.settimeout(_PASS_ON_S)
        try:
            session.connect(str(path))
            socket.send_fds(session, [b"j"], transport.descriptors())
        except OSError:
            return False
        transport.abandon()
        session.settimeout(None)
        with contextlib.suppress(OSError):
            session.recv(1)
        return True


@contextlib.contextmanager
def _doors_in(path: Path) -> Iterator["Doors"]:
    """Let further connections of a session come in at `path`, which nobody else can reach."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
    except OSError as error:
        raise HostFull(
            what=f"cannot make {path} ({error.strerror})", remedy="run ckpt receive as root"
        ) from error
    doors = Doors(listener)
    try:
        yield doors
    finally:
        doors.close()
        with contextlib.suppress(OSError):
            path.unlink()


@attrs.frozen
class Doors:
    """`session.Arrivals` over a socket in the file system."""

    listener: socket.socket

    def fileno(self) -> int:
        """See `session.Arrivals.fileno`."""
        return self.listener.fileno()

    def take(self) -> "PassedStreams | None":
        """See `session.Arrivals.take`."""
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return None
        _, uid, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if uid not in (0, os.geteuid()):
            connection.close()
            return None
        return PassedStreams(connection)

    def close(self) -> None:
        """See `session.Arrivals.close`."""
        self.listener.close()


@attrs.frozen
class PassedStreams:
    """`session.Arrival`: standard streams of another process, on their way."""

    connection: socket.socket

    def open(self) -> FdTransport:
        """See `session.Arrival.open`."""
        self.connection.settimeout(1.0)
        try:
            _, fds, _, _ = socket.recv_fds(self.connection, 1, 2, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            fds = []
        if len(fds) != 2:
            self.connection.close()
            raise PeerLost(peer="the sender", reason="it did not pass its streams on")
        return FdTransport(fds[0], fds[1], "the sender", self.connection.close)

    def close(self) -> None:
        """See `session.Arrival.close`."""
        self.connection.close()
