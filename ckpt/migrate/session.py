"""One session of a receiver: its first channel, and those that the same sender opens later.

A further connection comes with a preface that names the session; whoever took it (`listen`,
`stdio`) hands its descriptors to the session's process. There a thread makes it prove the session's
key, so that one who stalls is in nobody's way; few at a time, and what has not proved itself in
time is closed. Neighbours: `handshake`, `channel`.
"""

import contextlib
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import attrs

from ckpt.errors import MigrateError
from ckpt.migrate.channel import Channel
from ckpt.migrate.handshake import Pairing, Ticket, answer
from ckpt.migrate.messages import Purpose
from ckpt.migrate.transport import Transport

MAX_PROVING = 4
"""Further connections that prove themselves at the same time."""

MAX_JOINED = 16
"""Those that did, and were not yet asked for by `Session.accept`."""


class Arrival(Protocol):
    """A connection that came, and of which nothing is known."""

    def open(self) -> Transport:
        """Make a transport of it (by a TLS handshake, say); MigrateError: it is closed."""

    def close(self) -> None:
        """Close it instead."""


class Arrivals(Protocol):
    """Where further connections of one session come from."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when one came, or none will come any more."""

    def take(self) -> Arrival | None:
        """Return one that came, without waiting; None if it was a false alarm.

        Raises:
            EOFError: none will come any more.
        """

    def close(self) -> None:
        """Let no more come."""


@attrs.frozen
class Joined:
    """A further connection of a session, proved to be of the same sender."""

    purpose: Purpose
    channel: Channel


class Session:
    """What a handler of `listen` or `stdio` is given, in a process of its own."""

    def __init__(
        self,
        ticket: Ticket,
        pairing: Pairing,
        channel: Channel,
        arrivals: Arrivals,
    ) -> None:
        """Begin with `channel`, which has proved itself."""
        self.session_id = ticket.session_id
        self.channel = channel
        """The first one; after a cut, `accept` returns the next, which may be put here."""
        self._ticket = ticket
        self._pairing = pairing
        self._arrivals: Arrivals | None = arrivals
        self._patience = channel.patience
        self._joined: queue.SimpleQueue[Joined] = queue.SimpleQueue()
        self._proving = threading.BoundedSemaphore(MAX_PROVING)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._epoll.register(arrivals.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Return the descriptor that is readable when `accept` may have something (to poll)."""
        return self._epoll.fileno()

    def accept(self, timeout_s: float) -> Joined | None:
        """Return the next connection that joined this session; None if none came in time."""
        ends_s = time.monotonic() + timeout_s
        while True:
            for fd, _events in self._epoll.poll(max(0.0, ends_s - time.monotonic())):
                if fd == self._wake_fd:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake_fd)
                        return self._joined.get_nowait()
                else:
                    self._take_arrival()
            if time.monotonic() >= ends_s:
                return None

    def _take_arrival(self) -> None:
        if self._arrivals is None:
            return
        try:
            arrival = self._arrivals.take()
        except EOFError:
            self._epoll.unregister(self._arrivals.fileno())
            self._arrivals.close()
            self._arrivals = None
            return
        if arrival is None:
            return
        if not self._proving.acquire(blocking=False):
            arrival.close()
            return
        threading.Thread(
            target=self._prove, args=(arrival,), name="ckpt-joining", daemon=True
        ).start()

    def _prove(self, arrival: Arrival) -> None:
        try:
            channel = Channel(arrival.open(), patience=self._patience)
            purpose = answer(channel, self._ticket, self._pairing, joins=True)
            if self._epoll.closed or self._joined.qsize() >= MAX_JOINED:
                channel.close()
                return
            self._joined.put(Joined(purpose, channel))
            os.eventfd_write(self._wake_fd, 1)
        except MigrateError:
            # A stranger, or gone already; whoever it was has been told what it may know.
            return
        finally:
            self._proving.release()

    def close(self) -> None:
        """Let nobody join any more, and close the first channel; may be called again."""
        if self._arrivals:
            self._arrivals.close()
            self._arrivals = None
        self.channel.close()
        while not self._joined.empty():
            self._joined.get().channel.close()
        # `_wake_fd` stays: a thread that is late would write to whoever got its number.
        self._epoll.close()

    def abandon(self) -> None:
        """In a forked child: let go of our descriptors, and of nothing else."""
        self.channel.abandon()
        while not self._joined.empty():
            self._joined.get().channel.abandon()
        if self._arrivals:
            self._arrivals.close()
            self._arrivals = None
        self._epoll.close()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close, telling the peer of `error` on the first channel, if that is still open."""
        self.channel.__exit__(kind, error, traceback)
        self.close()


Handler = Callable[[Session], int]
"""Runs in the session's process; what it returns is that process's exit code."""
