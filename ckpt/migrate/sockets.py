"""TCP as a migration wants it: dead peers are noticed, and what is urgent does not wait in a queue.

Neighbours: `dial` connects, `listen` accepts; both set the same.
"""

import contextlib
import socket

from ckpt.errors import ConnectFailed
from ckpt.migrate.destination import Address

_UNSENT_BYTES = 1 << 19
"""What the kernel may hold unsent: enough to keep a link busy while we compress the next frame, and
little enough that the last message of a round is not behind a second of pages."""

_USER_TIMEOUT_MS = 20_000
_PROBE_AFTER_S = 5


def tune(connection: socket.socket) -> None:
    """Set what both sides want of a TCP connection."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_AFTER_S)


def connect(address: Address, timeout_s: float) -> socket.socket:
    """Return a connection to `address`, with each of its numbers tried in turn.

    Raises:
        ConnectFailed: nobody answers.
    """
    try:
        connection = socket.create_connection((address.host, address.port), timeout_s)
    except OSError as error:
        reason = f"cannot connect: {error.strerror or error}"
        raise ConnectFailed(peer=str(address), reason=reason) from error
    tune(connection)
    return connection


def listen(address: Address) -> socket.socket:
    """Return a socket that listens there; at every address of this host if `address` names none.

    Raises:
        ConnectFailed: that cannot be had.
    """
    try:
        if not address.host:
            return _listen_everywhere(address.port)
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(where[:2], family=family)
    except OSError as error:
        reason = f"cannot listen there: {error.strerror or error}"
        raise ConnectFailed(peer=str(address), reason=reason) from error


def _listen_everywhere(port: int) -> socket.socket:
    # Without IPv6 in the kernel the first way fails.
    with contextlib.suppress(OSError, ValueError):
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def name_of(where: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    """Return an address of the kernel's as ours; an IPv4 one in IPv6 clothes as what it is."""
    return Address(where[0].removeprefix("::ffff:"), where[1])
