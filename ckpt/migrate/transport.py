"""Bytes to and from the peer: a pair of descriptors (the pipes of ssh), or TLS over a socket.

Both never block in a system call, only in poll, and so know their time limits. Reading and writing
may happen in two threads at once; OpenSSL allows no two calls on one connection at a time, which a
lock around each call sees to. Neighbours: `tls` makes the encrypted one, `channel` uses both.
"""

import contextlib
import math
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ckpt.errors import PeerLost, ProtocolError


class Transport(Protocol):
    """What a channel needs of whatever carries it."""

    peer: str
    """Who is there, for messages."""

    def read_into(self, view: memoryview, wait_s: float) -> int | None:
        """Fill the beginning of `view` and return how much; 0: the peer ended, None: nothing came.

        Raises:
            PeerLost: the connection is gone.
            ProtocolError: what came is no TLS.
        """

    def write(self, view: memoryview, wait_s: float) -> int | None:
        """Send the beginning of `view` and return how much; None: nothing could be sent in time.

        After None, the same bytes have to come first in the next call. Raises as `read_into`.
        """

    def fileno(self) -> int:
        """Return the descriptor that is readable when something came."""

    def has_buffered(self) -> bool:
        """Tell whether something came that the descriptor does not show."""

    def close(self) -> None:
        """End the connection for both sides, even where a forked child still holds descriptors."""

    def abandon(self) -> None:
        """Close our descriptors, and leave the connection to the process that forked us."""


def wait_for(fd: int, events: int, wait_s: float) -> bool:
    """Wait until `fd` is ready for `events`, at most `wait_s` seconds; tell whether it is."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(None if math.isinf(wait_s) else max(0, math.ceil(wait_s * 1000))))


class FdTransport:
    """A pair of descriptors, which it owns: a socket twice, or two pipes."""

    def __init__(
        self, in_fd: int, out_fd: int, peer: str, on_close: Callable[[], None] | None = None
    ) -> None:
        """Take over `in_fd` and `out_fd` (may be the same); `on_close` is called after them."""
        self.peer = peer
        self._in_fd = in_fd
        self._out_fd = out_fd
        self._on_close = on_close
        self._open = True
        # Of the open file description, so of whoever shares it too: nobody does, these are ours.
        os.set_blocking(in_fd, False)
        os.set_blocking(out_fd, False)

    def descriptors(self) -> tuple[int, int]:
        """Return what is read from and what is written to, to hand them to another process."""
        return self._in_fd, self._out_fd

    def read_into(self, view: memoryview, wait_s: float) -> int | None:
        """See `Transport.read_into`."""
        try:
            return self._now_or_later(
                lambda: os.readv(self._in_fd, [view]), self._in_fd, select.POLLIN, wait_s
            )
        except OSError as error:
            raise PeerLost(peer=self.peer, reason=_why(error)) from error

    def write(self, view: memoryview, wait_s: float) -> int | None:
        """See `Transport.write`."""
        try:
            return self._now_or_later(
                lambda: os.write(self._out_fd, view), self._out_fd, select.POLLOUT, wait_s
            )
        except OSError as error:
            raise PeerLost(peer=self.peer, reason=_why(error)) from error

    def _now_or_later(
        self, call: Callable[[], int], fd: int, events: int, wait_s: float
    ) -> int | None:
        if not self._open:
            raise PeerLost(peer=self.peer, reason="the connection is closed")
        with contextlib.suppress(BlockingIOError):
            return call()
        if not wait_for(fd, events, wait_s):
            return None
        try:
            return call()
        except BlockingIOError:
            return None

    def fileno(self) -> int:
        """See `Transport.fileno`."""
        return self._in_fd

    def has_buffered(self) -> bool:
        """See `Transport.has_buffered`."""
        return False

    def close(self) -> None:
        """See `Transport.close`."""
        if not self._open:
            return
        _shut_down(self._out_fd)
        self.abandon()
        if self._on_close:
            self._on_close()

    def abandon(self) -> None:
        """See `Transport.abandon`."""
        if self._open:
            self._open = False
            for fd in {self._in_fd, self._out_fd}:
                os.close(fd)


class TlsTransport:
    """A TLS connection whose handshake is done."""

    def __init__(self, tls: ssl.SSLSocket, peer: str) -> None:
        """Take over `tls`."""
        self.peer = peer
        self._tls = tls
        self._fd = tls.fileno()
        self._turn = threading.Lock()
        tls.setblocking(False)

    def read_into(self, view: memoryview, wait_s: float) -> int | None:
        """See `Transport.read_into`."""
        return self._until(self._read_now, view, wait_s)

    def write(self, view: memoryview, wait_s: float) -> int | None:
        """See `Transport.write`."""
        return self._until(self._write_now, view, wait_s)

    def _read_now(self, view: memoryview, done: int) -> int:
        return self._tls.read(len(view) - done, view[done:])  # type: ignore[return-value]

    def _write_now(self, view: memoryview, done: int) -> int:
        return self._tls.write(view[done:])

    def _until(
        self, step: Callable[[memoryview, int], int], view: memoryview, wait_s: float
    ) -> int | None:
        """Do as much of `view` as goes without waiting, but wait for the first part of it.

        OpenSSL takes and gives a record (16 KiB) at a time, and may want the other direction first.
        """
        ends_s = time.monotonic() + wait_s
        try:
            while True:
                done, events = self._go_on(step, view)
                if done or not events:
                    return done
                if not wait_for(self._fd, events, ends_s - time.monotonic()):
                    return None
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                raise PeerLost(peer=self.peer, reason="it ended the connection") from error
            raise ProtocolError(peer=self.peer, reason=f"TLS: {describe_tls(error)}") from error
        except OSError as error:
            raise PeerLost(peer=self.peer, reason=_why(error)) from error

    def _go_on(self, step: Callable[[memoryview, int], int], view: memoryview) -> tuple[int, int]:
        """Return how much of `view` went, and what has to be waited for before more does, or 0."""
        done = 0
        try:
            with self._turn:
                while done < len(view):
                    n_bytes = step(view, done)
                    if n_bytes == 0:
                        break
                    done += n_bytes
        except ssl.SSLWantReadError:
            return done, select.POLLIN
        except ssl.SSLWantWriteError:
            return done, select.POLLOUT
        return done, 0

    def fileno(self) -> int:
        """See `Transport.fileno`."""
        return self._fd

    def has_buffered(self) -> bool:
        """See `Transport.has_buffered`."""
        with self._turn:
            return self._tls.fileno() >= 0 and self._tls.pending() > 0

    def close(self) -> None:
        """See `Transport.close`."""
        # No close_notify: messages know their length, so a cut is noticed without it.
        with contextlib.suppress(OSError):
            self._tls.shutdown(socket.SHUT_RDWR)
        self.abandon()

    def abandon(self) -> None:
        """See `Transport.abandon`."""
        self._tls.close()


def describe_tls(error: ssl.SSLError) -> str:
    """Return OpenSSL's own words for what went wrong, without its line numbers."""
    return (error.reason or str(error)).replace("_", " ").lower()


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _shut_down(fd: int) -> None:
    """End both directions of a socket; nothing happens to a pipe."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as same:
        same.shutdown(socket.SHUT_RDWR)
