"""Pages that are still at the source, for the servers of processes that run here already.

    process ── page fault ──> server (engine.guard) ── socket ──> Courier ── stream ──> source

The servers are forked, one for each process; a connection cannot be. So the worker stays, and
fetches for all of them, in threads: over any stream that is free, but one of them is kept for those
who wait. A server that hears nothing more of us ends, and its guard ends the process: no page is
ever made up. Neighbours: `serving` is the other side, `arriving_late` knows when it is over.
"""

import contextlib
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator

from ckpt.engine.lazy_pages import Key
from ckpt.errors import CkptError, PeerLost, ProtocolError
from ckpt.image.pages import decode_frame
from ckpt.image.reader import Piece
from ckpt.migrate.channel import Channel
from ckpt.migrate.messages import Fetch, Fetched
from ckpt.migrate.spans import pack_spans, unpack_spans
from ckpt.tracker.spans import Spans, total_bytes
from ckpt.units import RemoteAddr

_BATCH_BYTES = 256 << 10
"""What comes at once: who waits for a page of it waits for all."""
_RECONNECT_S = 300.0
"""How long to wait for the source, if there is no connection."""
_N_AHEAD = 2
"""How many batches a server asks for besides the one that is waited for."""
_LENGTH_BYTES = 8
_WORKER = "the receiver"


class Streams:
    """The connections over which pages are fetched; the source opens them, again after a cut."""

    def __init__(self, peer: str) -> None:
        """Begin without any."""
        self._peer = peer
        self._changed = threading.Condition()
        self._free: deque[Channel] = deque()
        self._n_open = 0
        self._heard_s = time.monotonic()
        self._gone = ""

    def add(self, channel: Channel) -> None:
        """Take one more."""
        with self._changed:
            self._free.append(channel)
            self._n_open += 1
            self._heard_s = time.monotonic()
            self._changed.notify_all()

    def give_up(self, reason: str) -> None:
        """Fetch nothing more: the source is gone."""
        with self._changed:
            self._gone = reason
            while self._free:
                self._free.popleft().close()
            self._changed.notify_all()

    def fetch(self, space: str, spans: Spans, *, awaited: bool) -> bytes | memoryview:
        """Return pages, raw; waits for the source, if it can be reached again.

        Raises:
            PeerLost: it is gone.
            PeerRefused: it cannot read them itself.
            ProtocolError: what came is not what was asked for.
        """
        asked = Fetch(space, pack_spans(spans))
        while True:
            channel = self._take(awaited=awaited)
            try:
                channel.send(asked)
                frame = channel.receive(Fetched).frame
            except PeerLost:
                self._drop(channel)
                continue
            except CkptError:
                self._drop(channel)
                raise
            try:
                raw = decode_frame(frame.stored, frame.encoding, total_bytes(spans))
            except ValueError as error:
                raise ProtocolError(peer=self._peer, reason=f"a frame: {error}") from error
            self._give_back(channel)
            return raw

    def _take(self, *, awaited: bool) -> Channel:
        with self._changed:
            while True:
                if self._gone:
                    raise PeerLost(peer=self._peer, reason=self._gone)
                if len(self._free) > (0 if awaited or self._n_open < 2 else 1):
                    return self._free.popleft()
                left_s = self._heard_s + _RECONNECT_S - time.monotonic()
                if left_s <= 0 and not self._n_open:
                    raise PeerLost(
                        peer=self._peer, reason=f"it could not be reached for {_RECONNECT_S:g} s"
                    )
                self._changed.wait(max(left_s, 1.0))

    def _drop(self, channel: Channel) -> None:
        channel.close()
        with self._changed:
            self._n_open -= 1
            self._changed.notify_all()

    def _give_back(self, channel: Channel) -> None:
        with self._changed:
            self._heard_s = time.monotonic()
            if self._gone:
                channel.close()
                return
            self._free.append(channel)
            self._changed.notify_all()


class RemotePages:
    """Pages of one process, as its server asks for them (`engine.lazy_pages.LazyPages`)."""

    def __init__(
        self, spans: Spans, asking: socket.socket, ahead: list[socket.socket], remedy: str
    ) -> None:
        """Ask over `asking` for what is waited for, over `ahead` for the rest."""
        self._batches = list(_cut(spans))
        self._asking = asking
        self._sockets = [asking, *ahead]
        self._ahead: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        for one in ahead:
            self._ahead.put(one)
        self.remedy = remedy

    @property
    def descriptors(self) -> set[int]:
        """See `LazyPages`."""
        return {one.fileno() for one in self._sockets}

    def iter_batches(self) -> Iterator[tuple[Key, list[Piece]]]:
        """See `LazyPages`: by address."""
        for index, spans in enumerate(self._batches):
            pieces: list[Piece] = []
            at = 0
            for start, end in spans:
                pieces.append((RemoteAddr(start), at, end - start))
                at += end - start
            yield (0, 0, index), pieces

    def fetch(self, key: Key, *, awaited: bool) -> bytearray:
        """See `LazyPages`; raises `PeerLost` when nobody answers any more."""
        spans = self._batches[key[2]]
        if awaited:
            return _ask(self._asking, spans)
        one = self._ahead.get()
        try:
            return _ask(one, spans)
        finally:
            self._ahead.put(one)

    def finish(self) -> None:
        """See `LazyPages`."""
        # Whoever fetched may be gone by now.
        with contextlib.suppress(OSError):
            self._asking.sendall(bytes(_LENGTH_BYTES))

    def let_go(self) -> None:
        """Close what only the server needs, when it has it."""
        for one in self._sockets:
            one.close()


class Courier:
    """Fetches for the servers, in threads."""

    def __init__(self, streams: Streams) -> None:
        """Begin with no server."""
        self._streams = streams
        self._lent: list[RemotePages] = []
        self._ours: list[socket.socket] = []
        self._lock = threading.Lock()
        self._n_left = 0
        self._failure: CkptError | None = None
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable when something has changed."""

    def pages(self, space: str, spans: Spans, remedy: str) -> RemotePages:
        """Return the pages of one process for a server that is yet to be forked."""
        pairs = [socket.socketpair() for _ in range(1 + _N_AHEAD)]
        asking, *ahead = [theirs for _, theirs in pairs]
        pages = RemotePages(spans, asking, ahead, remedy)
        self._lent.append(pages)
        self._n_left += 1
        for index, (ours, _) in enumerate(pairs):
            self._ours.append(ours)
            arguments = (ours, space, index == 0)
            threading.Thread(target=self._run, args=arguments, daemon=True).start()
        return pages

    def begin(self) -> None:
        """Notice from now on when a server ends: all have been forked."""
        for pages in self._lent:
            pages.let_go()

    @property
    def is_settled(self) -> bool:
        """Whether all servers are done, or one has failed."""
        with self._lock:
            return not self._n_left or self._failure is not None

    @property
    def failure(self) -> CkptError | None:
        """Why some pages will never come."""
        with self._lock:
            return self._failure

    def close(self) -> None:
        """Fetch no more; a server that is not done ends by that."""
        for one in self._ours:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for pages in self._lent:
            pages.let_go()

    def _run(self, ours: socket.socket, space: str, awaited: bool) -> None:
        try:
            with ours:
                self._carry(ours, space, awaited)
        except CkptError as error:
            self._fail(error)
        except OSError:
            self._fail(_ended())

    def _carry(self, ours: socket.socket, space: str, awaited: bool) -> None:
        while (length := _receive(ours, _LENGTH_BYTES)) is not None:
            n_bytes = int.from_bytes(length, "little")
            if not n_bytes:
                with self._lock:
                    self._n_left -= 1
                self._wake()
                return
            packed = _receive(ours, n_bytes)
            if packed is None:
                break
            raw = self._streams.fetch(space, unpack_spans(packed), awaited=awaited)
            ours.sendall(len(raw).to_bytes(_LENGTH_BYTES, "little"))
            ours.sendall(raw)
        if awaited:
            self._fail(_ended())

    def _fail(self, error: CkptError) -> None:
        with self._lock:
            # One that is done closes its sockets, too.
            if self._n_left and self._failure is None:
                self._failure = error
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self.wake_fd, 1)


def _ended() -> CkptError:
    return PeerLost(peer="the server of its pages", reason="it ended before all were there")


def _ask(over: socket.socket, spans: Spans) -> bytearray:
    packed = pack_spans(spans)
    try:
        over.sendall(len(packed).to_bytes(_LENGTH_BYTES, "little") + packed)
        length = _receive(over, _LENGTH_BYTES)
        raw = None if length is None else _receive(over, int.from_bytes(length, "little"))
    except OSError as error:
        raise PeerLost(peer=_WORKER, reason="it fetches no more pages") from error
    if raw is None:
        raise PeerLost(peer=_WORKER, reason="it fetches no more pages")
    return raw


def _receive(over: socket.socket, n_bytes: int) -> bytearray | None:
    """Return just so many bytes; None: the other side has ended."""
    data = bytearray(n_bytes)
    view = memoryview(data)
    while len(view):
        n_read = over.recv_into(view)
        if not n_read:
            return None
        view = view[n_read:]
    return data


def _cut(spans: Spans) -> Iterator[Spans]:
    """Cut spans into lists of together at most `_BATCH_BYTES`, in order."""
    batch: Spans = []
    room = _BATCH_BYTES
    for start, end in spans:
        at = start
        while at < end:
            stop = min(end, at + room)
            batch.append((at, stop))
            room -= stop - at
            at = stop
            if not room:
                yield batch
                batch, room = [], _BATCH_BYTES
    if batch:
        yield batch
