"""Answers senders over TCP: each session in a process of its own, so that no peer disturbs another.

The listener's process only reads prefaces (24 bytes, without ever waiting for one) and forks. TLS,
the handshake and the session happen in the child; one that has not proved itself in time is killed.
A connection whose preface names a session goes to that session's process, which makes it prove the
session's key. Strangers are bounded in number and in time, in all and for each address. Neighbours:
`session`, `tls`, `handshake`; `stdio` is the same for ssh.
"""

import os
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

import attrs

from ckpt.errors import CkptError
from ckpt.migrate.channel import Channel, Patience
from ckpt.migrate.destination import Address
from ckpt.migrate.handshake import (
    NEW_SESSION,
    PREFACE_BYTES,
    Pairing,
    answer,
    make_ticket,
    parse_preface,
)
from ckpt.migrate.offspring import Child, PassedSockets, run_and_exit
from ckpt.migrate.session import Handler, Session
from ckpt.migrate.sockets import listen, name_of, tune
from ckpt.migrate.tls import (
    CertificateFiles,
    ServerIdentity,
    accept_tls,
    load_identity,
    make_identity,
)

MAX_STRANGERS = 32
"""Connections whose preface has not come; one more, and the oldest is closed."""

MAX_UNPROVED = 16
"""Children whose sender has not proved itself."""

MAX_UNPROVED_EACH = 8
"""Of these, from one address."""

MAX_SESSIONS = 16

_PREFACE_S = 5.0


@attrs.frozen
class SessionEnd:
    """A session is over."""

    session_id: bytes
    exit_code: int
    """What the handler returned; negative: the signal that killed its process."""


@attrs.define
class _Stranger:
    """A connection of which we have less than a preface."""

    connection: socket.socket
    address: Address
    ends_s: float
    preface: bytes = b""


class Listener:
    """`ckpt receive --listen`: `with Listener(...) as listener: listener.serve(...)`."""

    def __init__(
        self,
        address: Address,
        trust: CertificateFiles | None,
        handler: Handler,
        *,
        once: bool = False,
        patience: Patience | None = None,
    ) -> None:
        """Listen at once; without `trust` a certificate and a token are made.

        Raises:
            ConnectFailed: the address cannot be had.
            UsageError: the files of `trust` cannot be used.
        """
        self._identity = load_identity(trust) if trust else make_identity()
        self._handler = handler
        self._once = once
        self._patience = patience or Patience()
        self._socket = listen(address)
        self._socket.setblocking(False)
        self.address = name_of(self._socket.getsockname())
        """Where it really listens (the port, if 0 was asked for)."""
        self.token = self._identity.token
        """To be shown to the sender; None with certificates of an authority."""
        self._strangers: dict[int, _Stranger] = {}
        self._children: dict[int, Child] = {}
        """By the pidfd of each."""
        self._has_admitted = False

    def serve(self, on_end: Callable[[SessionEnd], None]) -> None:
        """Answer until the one session of `once` has ended, else until an exception (Ctrl-C)."""
        while True:
            for fd in self._wait():
                if fd == self._socket.fileno():
                    self._accept()
                elif fd in self._strangers:
                    self._hear(self._strangers[fd])
                elif fd in self._children:
                    self._bury(self._children[fd], on_end)
                else:
                    self._attend(fd)
            self._end_late()
            if self._once and self._has_admitted and not self._sessions():
                return

    def _wait(self) -> list[int]:
        poll = select.poll()
        asking = [child.control.fileno() for child in self._children.values() if child.may_ask]
        for fd in (self._socket.fileno(), *self._strangers, *self._children, *asking):
            poll.register(fd, select.POLLIN)
        late = [stranger.ends_s for stranger in self._strangers.values()]
        late += [child.ends_s for child in self._children.values() if not child.session_id]
        wait_ms = max(0.0, min(late) - time.monotonic()) * 1000 + 1 if late else None
        return [fd for fd, _events in poll.poll(wait_ms)]

    def _sessions(self) -> list[Child]:
        return [child for child in self._children.values() if child.session_id]

    # ---- strangers

    def _accept(self) -> None:
        try:
            connection, where = self._socket.accept()
        except OSError:
            # It is gone already, or we are out of descriptors, which time will mend.
            return
        if len(self._strangers) >= MAX_STRANGERS:
            self._forget(next(iter(self._strangers.values()))).close()
        connection.setblocking(False)
        ends_s = time.monotonic() + min(_PREFACE_S, self._patience.handshake_s)
        self._strangers[connection.fileno()] = _Stranger(connection, name_of(where), ends_s)

    def _forget(self, stranger: _Stranger) -> socket.socket:
        del self._strangers[stranger.connection.fileno()]
        return stranger.connection

    def _hear(self, stranger: _Stranger) -> None:
        """Read what came of a preface; all of it leads on, anything else ends the connection."""
        try:
            came = stranger.connection.recv(PREFACE_BYTES - len(stranger.preface))
            stranger.preface += came
            if came and len(stranger.preface) < PREFACE_BYTES:
                return
            session_id = parse_preface(stranger.preface)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            self._forget(stranger).close()
            return
        with self._forget(stranger) as connection:
            for child in self._sessions():
                if child.session_id == session_id != NEW_SESSION:
                    child.pass_on(connection)
                    return
            self._begin(connection, stranger.address)

    # ---- children

    def _begin(self, connection: socket.socket, address: Address) -> None:
        """Fork the process in which this connection proves itself, or does not."""
        hosts = Counter(child.host for child in self._children.values() if not child.session_id)
        if hosts.total() >= MAX_UNPROVED or hosts[address.host] >= MAX_UNPROVED_EACH:
            return
        control, its_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # What is in their buffers would be written twice.
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError:
            # There is no room for one more, which time will mend.
            control.close()
            its_control.close()
            return
        if pid == 0:
            run_and_exit(lambda: self._be_session(connection, address, control, its_control))
        its_control.close()
        ends_s = time.monotonic() + self._patience.handshake_s * 2 + 1
        child = Child(pid, control, address.host, ends_s)
        self._children[child.pidfd] = child

    def _be_session(
        self,
        connection: socket.socket,
        address: Address,
        control: socket.socket,
        its_control: socket.socket,
    ) -> int:
        """In the child: let go of what is the listener's, and run the session."""
        control.close()
        self._close_all()
        return _run_session(
            connection, address, self._identity, self._patience, its_control, self._handler
        )

    def _attend(self, control_fd: int) -> None:
        """Hear a child say that its sender has proved itself."""
        for child in self._children.values():
            if child.control.fileno() == control_fd:
                child.may_ask = False
                if session_id := child.hear():
                    self._admit(child, session_id)

    def _bury(self, child: Child, on_end: Callable[[SessionEnd], None]) -> None:
        del self._children[child.pidfd]
        exit_code = child.reap()
        if child.session_id:
            on_end(SessionEnd(child.session_id, exit_code))

    def _admit(self, child: Child, session_id: bytes) -> None:
        """Tell a child whether its session may begin."""
        if self._once and self._has_admitted:
            child.say("this receiver was started for one session, which has begun")
        elif len(self._sessions()) >= MAX_SESSIONS:
            child.say("too many sessions are under way")
        else:
            # First noted, then said: from then on it is not ours to end.
            self._has_admitted = True
            child.session_id = session_id
            child.say("")

    def _end_late(self) -> None:
        now_s = time.monotonic()
        for stranger in [one for one in self._strangers.values() if one.ends_s <= now_s]:
            self._forget(stranger).close()
        for child in self._children.values():
            if not child.session_id and child.ends_s <= now_s:
                child.kill()

    # ---- the end

    def close(self) -> None:
        """Listen no more, and end what has not proved itself; sessions go on to their own end."""
        for child in list(self._children.values()):
            if not child.session_id:
                child.kill()
                del self._children[child.pidfd]
                child.reap()
        self._close_all()

    def _close_all(self) -> None:
        self._socket.close()
        for stranger in self._strangers.values():
            stranger.connection.close()
        for child in self._children.values():
            child.close()
        self._strangers.clear()
        self._children.clear()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See `close`."""
        self.close()


def _run_session(
    connection: socket.socket,
    address: Address,
    identity: ServerIdentity,
    patience: Patience,
    control: socket.socket,
    handler: Handler,
) -> int:
    """Be the child: let the sender prove itself, then be its session."""
    tune(connection)
    token = identity.token
    pairing = Pairing(token.secret, token.fingerprint) if token else Pairing()
    ticket = make_ticket()
    arrivals = PassedSockets(control, identity, patience.handshake_s)
    try:
        transport = accept_tls(connection, identity, str(address), patience.handshake_s)
        channel = Channel(transport, patience=patience)
        answer(channel, ticket, pairing, admit=lambda: arrivals.ask(ticket.session_id))
    except CkptError as error:
        return error.exit_code
    with Session(ticket, pairing, channel, arrivals) as session:
        return handler(session)
