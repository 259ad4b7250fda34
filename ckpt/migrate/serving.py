"""The memory of a tree that stands still here and runs there: read and sent as it is asked for.

    destination                          source
    Fetch(space, spans) ──────────────>  process_vm_readv of the frozen process
                        <──────────────  Fetched

Each of a few streams has a thread, and is opened again after a cut, for as long as this lasts. The
frozen tree is read only: it may be asked for the same pages again. Neighbours: `fetching` is the
other side, `remaining` knows when it is over.
"""

import contextlib
import threading
from collections.abc import Iterable

import attrs

from ckpt.engine.copying import read_all
from ckpt.errors import CkptError, PeerLost, PeerRefused, ProtocolError
from ckpt.image.pages import MAX_FRAME_BYTES, encode_frame
from ckpt.image.pipeline import Compression
from ckpt.migrate.channel import Channel
from ckpt.migrate.dial import Dialer
from ckpt.migrate.messages import Fetch, Fetched, Purpose
from ckpt.migrate.spans import unpack_spans
from ckpt.tracker.spans import Spans, intersect, near, total_bytes
from ckpt.units import AddrRange, Pid, RemoteAddr

N_STREAMS = 3
"""One for who waits, the others for what is fetched ahead of that."""
_PAUSE_S = 0.2


@attrs.frozen(repr=False)
class Kept:
    """The pages of one process that were not sent."""

    space: str
    pid: Pid
    spans: Spans


class Serving:
    """A context manager around the threads; leaving it has them end, without waiting for that."""

    def __init__(self, dialer: Dialer, kept: Iterable[Kept], compression: Compression) -> None:
        """Answer nobody yet.

        Args:
            dialer: whose session is under way.
            kept: what can be asked for; these processes stand still as long as this lasts.
            compression: of what is sent.
        """
        self._dialer = dialer
        self._kept = {one.space: one for one in kept if one.spans}
        level, pressed = compression.level, compression.pressed_level
        self._level = level if pressed is None else pressed
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._sent: dict[tuple[str, int], int] = {}
        self.total_bytes = sum(total_bytes(one.spans) for one in self._kept.values())
        """Of memory, that can be asked for."""
        self.wire_bytes = 0
        """That were sent for it."""

    @property
    def sent_bytes(self) -> int:
        """How much of the memory was sent, each page counted once."""
        with self._lock:
            return sum(self._sent.values())

    def start(self) -> None:
        """Answer from now on."""
        for index in range(N_STREAMS if self._kept else 0):
            name = f"ckpt-serving-{index}"
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._over.set()

    def _run(self) -> None:
        buffer = memoryview(bytearray(MAX_FRAME_BYTES))
        while not self._over.is_set():
            # Whatever is wrong with one connection, the next may be better.
            with contextlib.suppress(CkptError), self._dialer.attach(Purpose.STREAM) as channel:
                self._serve(channel, buffer)
            self._over.wait(_PAUSE_S)

    def _serve(self, channel: Channel, buffer: memoryview) -> None:
        while not self._over.is_set():
            try:
                # One that is silent for long may be cut without our knowing.
                asked = channel.receive(Fetch)
                ranges = self._check(channel, asked)
                n_bytes = sum(span.len_bytes for span in ranges)
                pages = buffer[:n_bytes]
                read_all(self._kept[asked.space].pid, ranges, pages)
                frame = encode_frame(pages, self._level)
                channel.send(Fetched(frame=frame))
            except (PeerLost, PeerRefused):
                return
            with self._lock:
                self._sent[asked.space, ranges[0].start] = n_bytes
                self.wire_bytes += len(frame.stored)

    def _check(self, channel: Channel, asked: Fetch) -> list[AddrRange]:
        """Return what is asked for.

        Raises:
            ProtocolError: it is nothing that may be asked for.
        """
        try:
            spans = unpack_spans(asked.spans)
        except ValueError as error:
            raise ProtocolError(peer=channel.peer, reason=str(error)) from error
        kept = self._kept.get(asked.space)
        if kept is None or not spans or total_bytes(spans) > MAX_FRAME_BYTES:
            raise ProtocolError(peer=channel.peer, reason="it asks for no pages, or for too many")
        if intersect(spans, near(kept.spans, spans)) != spans:
            raise ProtocolError(peer=channel.peer, reason="it asks for pages that it was sent")
        return [AddrRange(RemoteAddr(start), RemoteAddr(end)) for start, end in spans]

    def __enter__(self) -> "Serving":
        """Return self, started."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()
