"""Pages on their way into frames: compressed by threads, handed on in order, bounded.

The caller hands over buffers as it reads them from a target and must not wait for a compressor as
long as there is room; how much may be under way is bounded, so memory does not grow with the
target. A sink gets the frames in the order in which pages came, whichever thread finished first.
Neighbours: `writer` has page files for a sink, a migration its connection.
"""

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import attrs

from ckpt.image.pages import MAX_FRAME_BYTES, EncodedFrame, FrameSeal, encode_frame
from ckpt.image.workers import DEFAULT_THREADS, Workers

DEFAULT_LEVEL = 1
"""zstd's level: the quickest that still finds the zeros and pointers that memory is full of."""

PRESSED_LEVEL = -3
"""Quicker than level 1 by half on data that is half noise (0.97 against 0.69 GB/s), and 6 % longer;
on the heap of an interpreter about as quick, and a third longer."""

SLOTS_PER_THREAD = 4
"""Frames under way for each thread: being compressed, waiting for one, waiting to be written."""

GATHER_BELOW_BYTES = 1 << 17
"""Shorter writes are copied together into one frame: small frames compress badly."""

Release = Callable[[], None]


class FrameSink(Protocol):
    """Where frames go; used by one thread at a time."""

    def append(self, frame: EncodedFrame, n_pages: int) -> None:
        """Take the next frame of the page stream."""


@attrs.frozen(repr=False)
class Compression:
    """How pages become frames; nothing here changes what is read back.

    Attributes:
        level: of zstd; None: frames are stored raw.
        pressed_level: of zstd while compressing is what all else waits for; the same as `level`
            unless given. How far each thread has come decides, so the file differs from time to
            time.
        threads: that compress.
    """

    level: int | None = DEFAULT_LEVEL
    pressed_level: int | None = None
    threads: int = DEFAULT_THREADS


@attrs.frozen(slots=True, repr=False)
class _Finished:
    """A frame that was compressed (or given up: None) and waits for its turn to be handed on."""

    frame: EncodedFrame | None
    n_pages: int
    release: Release | None


class FramePipeline:
    """One page stream under way; its methods are for one thread."""

    def __init__(
        self,
        sink: FrameSink,
        page_size: int,
        options: Compression,
        seal: FrameSeal | None = None,
        first_number: int = 0,
    ) -> None:
        """Begin at the first page.

        With a `seal` frames are encrypted with it: the first gets the `first_number` in its
        generation, those that come behind it the next ones.
        """
        self._seal = seal
        self._first_number = first_number
        self.page_size = page_size
        self._sink = sink
        self._options = options
        self._workers = Workers(options.threads)
        self._slots = threading.Semaphore(options.threads * SLOTS_PER_THREAD)
        self._n_pages = 0
        self._n_submitted = 0
        self._gathered: bytearray | None = None
        self._gathered_bytes = 0
        self._spare: deque[bytearray] = deque()
        self._orphans: list[Release] = []
        # Guarded by the condition: what the threads share with us and with each other.
        self._changed = threading.Condition()
        self._finished: dict[int, _Finished] = {}
        self._n_written = 0
        self._writing = False
        self._failure: BaseException | None = None
        self._closed = False

    @property
    def n_pages(self) -> int:
        """Pages taken so far: the ordinal that the next one gets."""
        return self._n_pages

    def write(self, pages: memoryview | bytes, release: Release | None = None) -> int:
        """Append whole pages to the page stream.

        Ownership: from the call on the buffer belongs to the pipeline, until it calls `release`,
        once and always, also after a failure or a close; after that it looks at the buffer no more.
        `release` is called in this call (short buffers, which are copied) or in a compression
        thread; it must be quick, must not raise, and must not call the pipeline. Without `release`
        a buffer that can change must not until `drain` has returned.

        Blocks while too many frames are under way.

        Args:
            pages: contiguous, a multiple of the page size; empty is allowed. Buffers of a multiple
                of 1 MiB make the best frames.
            release: see above.

        Returns:
            The ordinal of the first page, for the `source` of a run.

        Raises:
            CkptError: the sink could not take an earlier frame.
            ValueError: the length is no multiple of the page size.
        """
        view = memoryview(pages).cast("B")
        first = self._n_pages
        short = len(view) < GATHER_BELOW_BYTES
        queued = False
        try:
            self._require_usable(len(view))
            self._n_pages += len(view) // self.page_size
            if short:
                self._gather(view)
            else:
                self._submit_gathered()
                queued = True
                self._submit_in_frames(view, release)
        except BaseException:
            if queued and release is not None:
                # Some of its frames may be under way: free only when the threads have ended.
                self._orphans.append(release)
            raise
        finally:
            if not queued and release is not None:
                release()
        return first

    def _require_usable(self, len_bytes: int) -> None:
        if self._closed or len_bytes % self.page_size:
            raise ValueError("the pipeline is closed, or this is no whole number of pages")
        self._raise_failure()

    def _gather(self, view: memoryview) -> None:
        """Copy a short write behind the others that wait for a frame to be full."""
        if self._gathered_bytes + len(view) > MAX_FRAME_BYTES:
            self._submit_gathered()
        if self._gathered is None:
            self._gathered = self._spare.popleft() if self._spare else bytearray(MAX_FRAME_BYTES)
        end = self._gathered_bytes + len(view)
        self._gathered[self._gathered_bytes : end] = view
        self._gathered_bytes = end

    def _submit_gathered(self) -> None:
        buffer, len_bytes = self._gathered, self._gathered_bytes
        self._gathered, self._gathered_bytes = None, 0
        if buffer is None:
            return
        release = partial(self._spare.append, buffer)
        if len_bytes:
            self._submit(memoryview(buffer)[:len_bytes], release)
        else:
            release()

    def _submit_in_frames(self, view: memoryview, release: Release | None) -> None:
        step = MAX_FRAME_BYTES // self.page_size * self.page_size
        # Frames are written in order, so the buffer is free when its last one is.
        for start in range(0, len(view), step):
            last = start + step >= len(view)
            self._submit(view[start : start + step], release if last else None)

    def _submit(self, view: memoryview, release: Release | None) -> None:
        level = self._options.level
        if not self._slots.acquire(blocking=False):
            # If frames wait to be written it is the disk that is slow, and smaller ones help it.
            if self._options.pressed_level is not None and len(self._finished) <= 1:
                level = self._options.pressed_level
            self._slots.acquire()
        number = self._n_submitted
        self._n_submitted += 1
        self._workers.submit(partial(self._encode, number, view, level, release))

    # -- in the compression threads --------------------------------------------------------------

    def _encode(
        self, number: int, view: memoryview, level: int | None, release: Release | None
    ) -> None:
        frame = None
        try:
            if self._failure is None:
                frame = encode_frame(view, level, self._seal, self._first_number + number)
        except BaseException as error:
            self._fail(error)
        with self._changed:
            self._finished[number] = _Finished(frame, len(view) // self.page_size, release)
            if self._writing:
                # The thread that writes will find it; this one goes on compressing.
                return
            self._writing = True
        self._write_in_order()

    def _write_in_order(self) -> None:
        """Write what has its turn, until the next in turn is not finished."""
        while True:
            with self._changed:
                finished = self._finished.pop(self._n_written, None)
                if finished is None:
                    self._writing = False
                    self._changed.notify_all()
                    return
            try:
                if self._failure is None and finished.frame is not None:
                    self._sink.append(finished.frame, finished.n_pages)
            except BaseException as error:
                self._fail(error)
            self._settle(finished.release)
            with self._changed:
                self._n_written += 1
            self._slots.release()

    def _settle(self, release: Release | None) -> None:
        try:
            if release is not None:
                release()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = error

    # -- the end ---------------------------------------------------------------------------------

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Wait until the sink has taken every page.

        Raises:
            CkptError: what the sink raised.
        """
        self._submit_gathered()
        with self._changed:
            self._changed.wait_for(lambda: self._n_written == self._n_submitted)
        self._raise_failure()

    def close(self) -> None:
        """End the threads and release every buffer; what was not drained may be lost."""
        if self._closed:
            return
        self._closed = True
        self._fail(ValueError("the pipeline was closed"))
        self._workers.close()
        # Only left over if the caller was interrupted between counting a frame and queueing it.
        for release in (*(left.release for left in self._finished.values()), *self._orphans):
            self._settle(release)
        self._finished.clear()
        self._orphans.clear()
