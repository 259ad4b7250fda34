"""Writing one generation: pages stream in, compressed by threads, and one rename makes it real.

The caller (a dump) hands over buffers as it reads them from the target and must not wait for a
compressor or a disk as long as there is room; how much may be under way is bounded, so memory does
not grow with the target. Frames are written in the order in which pages came, whichever thread
finished first, so that the same input gives the same file. Neighbours: `chain` makes writers and
holds the lock around them; `pages` encodes; `store` does the steps on disk.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Self

import attrs

from ckpt.errors import ImageUnusable
from ckpt.image.format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    TEMPORARY_PREFIX,
    Kind,
    Manifest,
    PageFile,
    Parent,
    encode_manifest,
    generation_name,
    page_file_name,
)
from ckpt.image.pages import MAX_FRAME_BYTES, EncodedFrame, FrameTable, encode_frame
from ckpt.image.runs import RunTable
from ckpt.image.store import Store
from ckpt.image.workers import DEFAULT_THREADS, Workers
from ckpt.units import GenerationNo

DEFAULT_LEVEL = 1
"""zstd's level: the quickest that still finds the zeros and pointers that memory is full of."""

PRESSED_LEVEL = -3
"""Quicker than level 1 by half on data that is half noise (0.97 against 0.69 GB/s), and 6 % longer;
on the heap of an interpreter about as quick, and a third longer."""

SLOTS_PER_THREAD = 4
"""Frames under way for each thread: being compressed, waiting for one, waiting to be written."""

GATHER_BELOW_BYTES = 1 << 17
"""Shorter writes are copied together into one frame: small frames compress badly."""

PAGE_FILE_BYTES = 1 << 30
"""A page file is closed at the first frame that ends past this, and synced: the disk works during
the dump and not only at its end."""

Release = Callable[[], None]


@attrs.frozen(repr=False)
class WriterOptions:
    """How a generation is written; nothing here changes what is read back.

    Attributes:
        level: of zstd.
        pressed_level: of zstd while compressing is what all else waits for; the same as `level`
            unless given. How far each thread has come decides, so the file differs from time to
            time.
        threads: that compress.
        page_file_bytes: see `PAGE_FILE_BYTES`.
    """

    level: int = DEFAULT_LEVEL
    pressed_level: int | None = None
    threads: int = DEFAULT_THREADS
    page_file_bytes: int = PAGE_FILE_BYTES


@attrs.frozen(repr=False)
class Identity:
    """Which generation of which chain a writer writes."""

    chain_id: str
    generation: GenerationNo
    parent: Parent | None
    page_size: int


@attrs.frozen(slots=True, repr=False)
class _Finished:
    """A frame that was compressed (or given up: None) and waits for its turn to be written."""

    frame: EncodedFrame | None
    n_pages: int
    release: Release | None


class _FrameFiles:
    """The page files of the generation; used by one thread at a time."""

    def __init__(self, store: Store, directory: str, limit_bytes: int) -> None:
        self._store = store
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._fd: int | None = None
        self._tables: list[FrameTable] = []
        self._sizes: list[int] = []

    def append(self, frame: EncodedFrame, n_pages: int) -> None:
        if self._fd is None:
            name = page_file_name(len(self._tables))
            self._fd = self._store.create_file(self._directory, name)
            self._tables.append(FrameTable())
            self._sizes.append(0)
        self._store.append(self._fd, frame.stored)
        self._tables[-1].append(n_pages, frame)
        self._sizes[-1] += len(frame.stored)
        if self._sizes[-1] >= self._limit_bytes:
            self.finish()

    def sync(self) -> None:
        if self._fd is not None:
            self._store.sync_file(self._fd)

    def finish(self) -> None:
        """Sync and close the file being written, if any."""
        self.sync()
        self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            self._store.close_file(fd)

    def list(self) -> tuple[PageFile, ...]:
        return tuple(
            PageFile(size, table) for size, table in zip(self._sizes, self._tables, strict=True)
        )


class GenerationWriter:
    """One generation on its way to disk; a context manager, made by `Chain.begin`.

    Leaving it without `commit` ends the threads and removes the temporary directory; the chain is
    then as it was. Its methods are for one thread.
    """

    def __init__(
        self,
        store: Store,
        identity: Identity,
        options: WriterOptions,
        *,
        check_spaces: Callable[[Mapping[str, RunTable]], None],
        on_close: Callable[[Manifest | None], None],
    ) -> None:
        """Make the temporary directory; `Chain.begin` is the way to call this.

        Args:
            store: of the chain, locked.
            identity: what is written.
            options: how.
            check_spaces: raises if a run refers to a parent that does not have it.
            on_close: called once, with the manifest if there was a commit.
        """
        self._store = store
        self._identity = identity
        self._options = options
        self._check_spaces = check_spaces
        self._on_close = on_close
        self._temporary = TEMPORARY_PREFIX + generation_name(identity.generation)
        store.make_directory(self._temporary)
        self._files = _FrameFiles(store, self._temporary, options.page_file_bytes)
        self._workers = Workers(options.threads)
        n_slots = options.threads * SLOTS_PER_THREAD
        self._slots = threading.Semaphore(n_slots)
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
    def generation(self) -> GenerationNo:
        """The number that the generation will have."""
        return self._identity.generation

    @property
    def page_size(self) -> int:
        """Bytes per page."""
        return self._identity.page_size

    @property
    def n_pages(self) -> int:
        """Pages written so far: the ordinal that the next one gets."""
        return self._n_pages

    def write_pages(self, pages: memoryview | bytes, release: Release | None = None) -> int:
        """Append whole pages to the page stream.

        Ownership: from the call on the buffer belongs to the writer, until it calls `release`, once
        and always, also after a failure or when the writer is left without commit; after that it
        looks at the buffer no more. `release` is called in this call (short buffers, which are
        copied) or in a compression thread; it must be quick, must not raise, and must not call the
        writer. Without `release` a buffer that can change must not until `flush` has returned.

        Blocks while too many frames are under way.

        Args:
            pages: contiguous, a multiple of the page size; empty is allowed. Buffers of a multiple
                of 1 MiB make the best frames.
            release: see above.

        Returns:
            The ordinal of the first page, for the `source` of a run.

        Raises:
            HostFull, ImageUnusable: an earlier write failed; leave the writer.
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
            raise ValueError("the writer is closed, or this is no whole number of pages")
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

    def _encode(self, number: int, view: memoryview, level: int, release: Release | None) -> None:
        frame = None
        try:
            if self._failure is None:
                frame = encode_frame(view, level)
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
                    self._files.append(finished.frame, finished.n_pages)
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
        """Wait until every page is compressed and written, though not yet on the disk.

        Raises:
            HostFull, ImageUnusable: something could not be written; leave the writer.
        """
        self._submit_gathered()
        with self._changed:
            self._changed.wait_for(lambda: self._n_written == self._n_submitted)
        self._raise_failure()

    def flush(self) -> None:
        """Wait until every page is compressed, written and on the disk.

        Raises:
            HostFull, ImageUnusable: something could not be written; leave the writer.
        """
        self.drain()
        self._files.sync()

    def commit(
        self,
        *,
        spaces: Mapping[str, RunTable],
        records: Mapping[str, object],
        host: Mapping[str, object],
        tracker: str,
        reason: str = "",
        freeze_ms: float = 0.0,
        wall_ms: float = 0.0,
        created_s: float | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> Manifest:
        """Make the generation real: flush, manifest, sync, one rename, sync.

        If this raises, the generation is absent; in the one case that only the last sync failed it
        is there, whole, and a power cut might still take it away.

        Args:
            spaces: page space by name -> every page of every mapping in it.
            records: whatever the upper layers need, made of what `codec.pack` takes.
            host: facts of the machine, the same.
            tracker: which tracker found the pages.
            reason: why it is full, for people.
            freeze_ms: see `Manifest`.
            wall_ms: see `Manifest`.
            created_s: now, if not given.
            extra: fields that this version does not know, to be kept.

        Returns:
            The manifest, with its digest.

        Raises:
            HostFull, ImageUnusable: it could not be written.
            ValueError: a run table is wrong, or refers to a parent that does not have the page.
        """
        self.flush()
        self._files.finish()
        identity = self._identity
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            chain_id=identity.chain_id,
            generation=identity.generation,
            kind=Kind.FULL if identity.parent is None else Kind.DELTA,
            parent=identity.parent,
            created_s=time.time() if created_s is None else created_s,
            page_size=identity.page_size,
            tracker=tracker,
            reason=reason,
            freeze_ms=freeze_ms,
            wall_ms=wall_ms,
            host=dict(host),
            records=dict(records),
            spaces=dict(spaces),
            page_files=self._files.list(),
            extra=dict(extra or {}),
        )
        encoded, digest = encode_manifest(manifest)
        if len(encoded) > MAX_MANIFEST_BYTES:
            raise ImageUnusable(
                str(self._store.path),
                f"the page table would take {len(encoded)} bytes, the limit is"
                f" {MAX_MANIFEST_BYTES}: take a full generation while less is scattered",
            )
        self._check_spaces(spaces)
        self._publish(encoded)
        manifest = attrs.evolve(manifest, digest=digest)
        self._close(manifest)
        return manifest

    def _publish(self, encoded: bytes) -> None:
        store = self._store
        store.write_file(self._temporary, MANIFEST_NAME, data=encoded)
        store.sync_directory(self._temporary)
        store.rename(self._temporary, generation_name(self.generation))
        store.sync_directory()

    def abort(self) -> None:
        """Give up: release every buffer, end the threads, remove what was written."""
        if self._closed:
            return
        self._fail(ValueError("the writer was left without commit"))
        self._close(None)

    def _close(self, manifest: Manifest | None) -> None:
        self._closed = True
        self._workers.close()
        # Only left over if the caller was interrupted between counting a frame and queueing it.
        for release in (*(left.release for left in self._finished.values()), *self._orphans):
            self._settle(release)
        self._finished.clear()
        self._orphans.clear()
        try:
            self._files.close()
        finally:
            if manifest is None:
                self._store.remove_temporary(self._temporary)
            self._on_close(manifest)

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See `abort`; does nothing after a commit."""
        self.abort()
