"""The processes of a listener's sessions, seen from both sides.

Between the two is one socket of packets. The child asks once whether its session may begin (16
bytes, its id) and is answered with a sentence why not, or an empty one; later the parent passes it
the connections that join the session. When it ends the parent reads the end. Neighbours: `listen`.
"""

import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import attrs

from ckpt.errors import CkptError
from ckpt.migrate.handshake import SESSION_ID_BYTES
from ckpt.migrate.sockets import name_of, tune
from ckpt.migrate.tls import ServerIdentity, accept_tls
from ckpt.migrate.transport import TlsTransport

_EXIT_BUG = 70
_EXIT_INTERRUPTED = 130

_MAY = b"+"
_MAY_NOT = b"-"
_JOINS = b"j"


@attrs.define
class Child:
    """A session's process as the listener sees it."""

    pid: int
    control: socket.socket
    host: str
    """Of the sender."""
    ends_s: float
    """When it is killed, if it has not proved itself."""
    session_id: bytes = b""
    """Empty: it has not."""
    may_ask: bool = True
    """It has not asked yet, which it does once."""
    pidfd: int = attrs.field(init=False)
    """Readable when it has ended, whoever else still holds its end of `control`."""

    def __attrs_post_init__(self) -> None:
        """Open `pidfd`, while the number is certainly its."""
        self.pidfd = os.pidfd_open(self.pid)

    def hear(self) -> bytes:
        """Return the id of the session that asks whether it may begin; empty: it says no more."""
        try:
            return self.control.recv(SESSION_ID_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            return b""

    def say(self, reason: str) -> None:
        """Answer that: an empty `reason` lets it begin."""
        with contextlib.suppress(OSError):
            self.control.send(_MAY_NOT + reason.encode() if reason else _MAY)

    def pass_on(self, connection: socket.socket) -> None:
        """Hand over a connection that joins; if too many wait there, it is dropped."""
        with contextlib.suppress(OSError):
            socket.send_fds(self.control, [_JOINS], [connection.fileno()], socket.MSG_DONTWAIT)

    def kill(self) -> None:
        """Kill it; its end is then heard of like that of any other."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self) -> int:
        """Wait for its end, which is certain, and return its exit code; negative: a signal."""
        self.close()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Let go of it; its session goes on, and nothing can join it any more."""
        self.control.close()
        os.close(self.pidfd)


class PassedSockets:
    """`session.Arrivals` in the child: what the listener passes on."""

    def __init__(self, control: socket.socket, identity: ServerIdentity, timeout_s: float) -> None:
        """Take over `control`."""
        self._control = control
        self._identity = identity
        self._timeout_s = timeout_s

    def ask(self, session_id: bytes) -> str | None:
        """Ask the listener whether the session may begin; return why not, or None."""
        try:
            self._control.send(session_id)
            answer = self._control.recv(1 << 12)
        except OSError:
            answer = b""
        if answer == _MAY:
            return None
        return answer[1:].decode() or "this receiver has ended"

    def fileno(self) -> int:
        """See `session.Arrivals.fileno`."""
        return self._control.fileno()

    def take(self) -> "PassedSocket | None":
        """See `session.Arrivals.take`."""
        try:
            data, fds, _flags, _sender = socket.recv_fds(
                self._control, 1, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        return PassedSocket(socket.socket(fileno=fds[0]), self._identity, self._timeout_s)

    def close(self) -> None:
        """See `session.Arrivals.close`."""
        self._control.close()


@attrs.frozen
class PassedSocket:
    """`session.Arrival`: a connection before its TLS handshake."""

    connection: socket.socket
    identity: ServerIdentity
    timeout_s: float

    def open(self) -> TlsTransport:
        """See `session.Arrival.open`."""
        try:
            peer = str(name_of(self.connection.getpeername()))
            tune(self.connection)
        except OSError:
            # Gone before it was looked at; the handshake will find out.
            peer = "a sender"
        return accept_tls(self.connection, self.identity, peer, self.timeout_s)

    def close(self) -> None:
        """See `session.Arrival.close`."""
        self.connection.close()


def run_and_exit(work: Callable[[], int]) -> NoReturn:
    """In a forked child: do `work` and exit with what it returns; nothing of the parent's is run.

    A user's trouble was told to the peer, who tells the user; a bug of ours shows its traceback.
    """
    code = _EXIT_BUG
    try:
        code = work()
    except CkptError as error:
        code = error.exit_code
    except KeyboardInterrupt:
        code = _EXIT_INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
