"""Page frames on their way in: put in place by threads, or kept for the end.

    Pages ──> where do they belong? ──> memory of an embryo       decoded and written, by threads
                                    └─> anywhere else             kept as they came (`arriving`)

The frames of one round have no page in common, so their order does not matter; between rounds all
of them are waited for.
"""

import mmap
from array import array
from collections import deque
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import Self

from ckpt.engine.ground import Ground
from ckpt.engine.prefilling import Piece, Prefilled
from ckpt.engine.records import space_name
from ckpt.engine.stream import Copied, Stream
from ckpt.errors import ProtocolError
from ckpt.image.arriving import Arriving
from ckpt.image.pages import EncodedFrame, decode_frame
from ckpt.image.workers import Pending, Workers
from ckpt.migrate.buffers import FrameBuffers
from ckpt.migrate.channel import Channel
from ckpt.migrate.messages import Pages
from ckpt.tracker.spans import Spans

_THREADS = 2
_FRAMES = 16
"""How far the source can be ahead of us."""
_PLACE_BYTES = 24
_Parts = list[tuple[Prefilled, list[Piece]]]
"""Which pieces of a frame go where."""


class Taking:
    """A context manager around the threads; leaving it waits for them."""

    def __init__(
        self, channel: Channel, arriving: Arriving, ground: Ground | None, *, keeps: bool
    ) -> None:
        """Put pages on `ground`, if there is one; keep all frames with `keeps`."""
        self._channel = channel
        self.arriving = arriving
        self._keeps = keeps
        rooms = ground.prefilled if ground else {}
        self._rooms = {space_name(pid): prefilled for pid, prefilled in rooms.items()}
        self._buffers = FrameBuffers(_FRAMES)
        self.place = self._buffers.take
        """For `Channel.receive`."""
        self._workers = Workers(_THREADS)
        self._pending: deque[Pending[None]] = deque()
        self.kept = Stream()
        """What the frames hold that were kept; of the others only how many pages."""

    def take(self, pages: Pages) -> None:
        """Take one frame.

        Raises:
            ProtocolError: its pages belong nowhere.
            HostFull, RestoreFailed, ...: it, or one before it, could not be put away.
        """
        places = list(self._iter_places(pages))
        n_bytes = sum(end - start for _, start, end in places)
        parts = self._plan(places)
        ahead_bytes = sum(len_bytes for _, pieces in parts for _, _, len_bytes in pieces)
        keep = ahead_bytes < n_bytes or self._keeps
        self._note(places if keep else [("", 0, n_bytes)])
        self.arriving.append(pages.frame, n_bytes // mmap.PAGESIZE, keep=keep)
        if not parts:
            self._buffers.give_back(pages.frame.stored)
            return
        while self._pending and self._pending[0].is_done:
            self._pending.popleft().wait()
        self._pending.append(self._workers.submit(partial(self._put, pages.frame, parts, n_bytes)))

    def _note(self, places: list[tuple[str, int, int]]) -> None:
        """Note what is in the stream next; an entry is of one space, and ascending."""
        spans: Spans = []
        last: tuple[str, int] | None = None
        for space, start, end in places:
            if last is None or space != last[0] or start < last[1]:
                spans = []
                self.kept.append(Copied(space, spans))
            spans.append((start, end))
            last = space, end

    def _plan(self, places: list[tuple[str, int, int]]) -> _Parts:
        """Return what of a frame is put in place ahead."""
        of_space: dict[str, list[tuple[int, int, int]]] = {}
        at = 0
        for space, start, end in places:
            of_space.setdefault(space, []).append((start, end, at))
            at += end - start
        parts = [
            (self._rooms[space], self._rooms[space].plan(own))
            for space, own in of_space.items()
            if space in self._rooms
        ]
        return [(room, pieces) for room, pieces in parts if pieces]

    def _put(self, frame: EncodedFrame, parts: _Parts, n_bytes: int) -> None:
        try:
            raw = memoryview(decode_frame(frame.stored, frame.encoding, n_bytes))
            for room, pieces in parts:
                room.put(raw, pieces)
        except ValueError as error:
            raise ProtocolError(peer=self._channel.peer, reason=f"a frame: {error}") from error
        finally:
            self._buffers.give_back(frame.stored)

    def finish(self) -> None:
        """Wait until all is in place, and be ready to be asked where it is.

        Raises:
            RestoreFailed, ProtocolError: some of it could not be put there.
        """
        while self._pending:
            self._pending.popleft().wait()
        self.kept.keep_up(mmap.PAGESIZE)

    @property
    def there(self) -> dict[str, Spans]:
        """Return what is in place of each page space, and need not be read from frames."""
        if self._keeps:
            return {}
        return {space: room.there for space, room in self._rooms.items()}

    def _iter_places(self, pages: Pages) -> Iterator[tuple[str, int, int]]:
        if len(pages.places) % _PLACE_BYTES:
            raise ProtocolError(peer=self._channel.peer, reason="places of pages are cut short")
        places = array("Q", pages.places)
        for index in range(0, len(places), 3):
            number, start, end = places[index : index + 3]
            if number >= len(pages.spaces) or not start < end or (start | end) % mmap.PAGESIZE:
                raise ProtocolError(peer=self._channel.peer, reason="pages belong to no place")
            yield pages.spaces[number], start, end

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the threads."""
        self._workers.close()
