"""Answers senders: each session in a process of its own, so that no peer disturbs another."""

from collections.abc import Callable

import attrs

from ckpt.migrate.channel import Patience
from ckpt.migrate.destination import Address
from ckpt.migrate.session import Session
from ckpt.migrate.tls import CertificateFiles

Handler = Callable[[Session], int]
"""Runs in the session's process; what it returns is that process's exit code."""


@attrs.frozen
class SessionEnd:
    """A session is over."""

    session_id: bytes
    exit_code: int
    """What the handler returned; negative: the signal that killed its process."""


class Listener:
    """`ckpt receive --listen`: `with Listener(...) as listener: listener.serve(...)`."""

    address: Address
    """Where it really listens (the port, if 0 was asked for)."""
    token: object
    """The `Token` to show, None with `CertificateFiles`."""

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
        """
        raise NotImplementedError

    def serve(self, on_end: Callable[[SessionEnd], None]) -> None:
        """Answer until the one session of `once` has ended, else until an exception (Ctrl-C)."""
        raise NotImplementedError


def serve_stdio(handler: Handler) -> int:
    """`ckpt receive --stdio`: one session over standard input and output; returns its exit code.

    Standard output leads to standard error from here on, whatever prints.
    """
    raise NotImplementedError
