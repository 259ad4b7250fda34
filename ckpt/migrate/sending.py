"""A page stream on its way to another host: the same frames that a dump writes into page files.

The destination puts pages in place as they come, so each frame says where its pages belong. What
was read (`engine.copying.Copy.stream`) tells it: the frames hold just these pages, in this order.
"""

from array import array
from collections.abc import Iterator

from ckpt.engine.stream import Alias, Stream
from ckpt.image.pages import EncodedFrame, FrameTable
from ckpt.image.pipeline import Compression, FramePipeline, Release
from ckpt.migrate.channel import Channel
from ckpt.migrate.messages import Pages, RoundEnds

Place = tuple[str, int, int]
"""Page space, start and end of a range in it."""


class Sender:
    """Compresses and sends pages; a `PageSink`, and a context manager, which ends its threads."""

    def __init__(self, channel: Channel, page_size: int, compression: Compression) -> None:
        """Begin at the first page of the stream."""
        self.page_size = page_size
        self.frames = FrameTable()
        """All that was sent."""
        self.n_bytes = 0
        """Stored bytes of all that was sent."""
        self._channel = channel
        self._n_rounds = 0
        self._cursor: PlaceCursor | None = None
        self._pipeline = FramePipeline(self, page_size, compression)

    def follow(self, stream: Stream) -> None:
        """Take the places of pages from `stream`, which grows before its pages are written."""
        self._cursor = PlaceCursor(stream)

    def write_pages(self, pages: memoryview | bytes, release: Release | None = None) -> int:
        """See `PageSink`."""
        return self._pipeline.write(pages, release)

    def drain(self) -> None:
        """See `PageSink`: all was sent, and has been put away there.

        Raises:
            MigrateError: the destination was lost, or refuses.
        """
        self._pipeline.drain()
        self._n_rounds += 1
        self._channel.send(RoundEnds(self._n_rounds))
        self._channel.receive(RoundEnds)

    def flush(self) -> None:
        """Wait until all was sent; it may not have been put away there yet."""
        self._pipeline.drain()

    def append(self, frame: EncodedFrame, n_pages: int) -> None:
        """Send one frame (a `FrameSink`; called by the threads of the pipeline, in order)."""
        assert self._cursor is not None
        names: dict[str, int] = {}
        places = array("Q")
        for space, start, end in self._cursor.take(n_pages * self.page_size):
            places.extend((names.setdefault(space, len(names)), start, end))
        self._channel.send(Pages(tuple(names), places.tobytes(), frame=frame))
        self.frames.append(n_pages, frame)
        self.n_bytes += len(frame.stored)

    def close(self) -> None:
        """End the threads."""
        self._pipeline.close()


class PlaceCursor:
    """Walks what was read, as far as it was read."""

    def __init__(self, stream: Stream) -> None:
        """Begin at the first page."""
        self._stream = stream
        self._entry = 0
        self._span = 0
        self._taken = 0
        """Bytes of that span."""

    def take(self, len_bytes: int) -> Iterator[Place]:
        """Yield where the next pages belong.

        Raises:
            ValueError: so much was not read.
        """
        while len_bytes:
            if self._entry >= len(self._stream):
                raise ValueError("more pages were written than read")
            copied = self._stream[self._entry]
            if isinstance(copied, Alias) or self._span >= len(copied.spans):
                self._entry, self._span = self._entry + 1, 0
                continue
            start, end = copied.spans[self._span]
            start += self._taken
            stop = min(end, start + len_bytes)
            yield copied.space, start, stop
            len_bytes -= stop - start
            self._taken += stop - start
            if stop == end:
                self._span, self._taken = self._span + 1, 0
