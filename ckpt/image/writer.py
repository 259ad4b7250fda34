"""Writing one generation: pages stream in (`pipeline`), and one rename makes it real.

Frames are written in the order in which pages came, so that the same input gives the same file.
Neighbours: `chain` makes writers and holds the lock around them; `store` does the steps on disk.
"""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import attrs

from ckpt import fault
from ckpt.errors import HostFull, ImageUnusable
from ckpt.image.format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SEALED_VERSION,
    TEMPORARY_PREFIX,
    Kind,
    Manifest,
    PageFile,
    Parent,
    encode_manifest,
    generation_name,
    page_file_name,
)
from ckpt.image.newest import write_newest
from ckpt.image.pages import EncodedFrame, FrameTable
from ckpt.image.pipeline import Compression, FramePipeline, Release
from ckpt.image.runs import RunTable
from ckpt.image.sealing import Sealed
from ckpt.image.store import Store
from ckpt.units import GenerationNo

PAGE_FILE_BYTES = 1 << 30
"""A page file is closed at the first frame that ends past this, and synced: the disk works during
the dump and not only at its end."""


@attrs.frozen(repr=False)
class WriterOptions(Compression):
    """How a generation is written; nothing here changes what is read back."""

    page_file_bytes: int = PAGE_FILE_BYTES
    """See `PAGE_FILE_BYTES`."""


@attrs.frozen(repr=False)
class Identity:
    """Which generation of which chain a writer writes."""

    chain_id: str
    generation: GenerationNo
    parent: Parent | None
    page_size: int


class FrameFiles:
    """Page files of a generation; used by one thread at a time."""

    def __init__(self, store: Store, directory: str, limit_bytes: int, first: int = 0) -> None:
        """Write files of about `limit_bytes` into `directory`, named from number `first` on."""
        self._store = store
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._first = first
        self._fd: int | None = None
        self._tables: list[FrameTable] = []
        self._sizes: list[int] = []

    def append(self, frame: EncodedFrame, n_pages: int) -> None:
        """Write the next frame."""
        if self._fd is None:
            name = page_file_name(self._first + len(self._tables))
            self._fd = self._store.create_file(self._directory, name)
            self._tables.append(FrameTable())
            self._sizes.append(0)
        self._store.append(self._fd, frame.stored)
        self._tables[-1].append(n_pages, frame)
        self._sizes[-1] += len(frame.stored)
        if self._sizes[-1] >= self._limit_bytes:
            self.finish()

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self._fd is not None:
            self._store.sync_file(self._fd)

    def finish(self) -> None:
        """Sync and close the file being written, if any."""
        self.sync()
        self.close()

    def close(self) -> None:
        """Close the file being written, if any."""
        fd, self._fd = self._fd, None
        if fd is not None:
            self._store.close_file(fd)

    def list(self) -> tuple[PageFile, ...]:
        """Return all files, in order."""
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
        sealed: Sealed | None,
        check_spaces: Callable[[Mapping[str, RunTable]], None],
        on_close: Callable[[Manifest | None], None],
    ) -> None:
        """Make the temporary directory; `Chain.begin` is the way to call this.

        Args:
            store: of the chain, locked.
            identity: what is written.
            options: how.
            sealed: a key that no other writer has had, to encrypt it with.
            check_spaces: raises if a run refers to a parent that does not have it.
            on_close: called once, with the manifest if there was a commit.
        """
        self._store = store
        self._identity = identity
        self._sealed = sealed
        self._check_spaces = check_spaces
        self._on_close = on_close
        self._temporary = TEMPORARY_PREFIX + generation_name(identity.generation)
        store.make_directory(self._temporary)
        try:
            fault.reach("image-made")
            self._files = FrameFiles(store, self._temporary, options.page_file_bytes)
            seal = sealed.seal if sealed else None
            self._pipeline = FramePipeline(self._files, identity.page_size, options, seal)
        except BaseException:
            # Nobody is there yet who could leave us.
            store.remove_temporary(self._temporary)
            raise
        self._closed = False
        self.unnoted = ""
        """Why it could not be noted as the newest (`newest`), which harms nothing: the next one
        will be. Empty if it was."""

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
        return self._pipeline.n_pages

    def write_pages(self, pages: memoryview | bytes, release: Release | None = None) -> int:
        """Append whole pages to the page stream; see `FramePipeline.write`.

        Raises:
            HostFull, ImageUnusable: an earlier write failed; leave the writer.
            ValueError: the length is no multiple of the page size, or the writer is closed.
        """
        return self._pipeline.write(pages, release)

    def drain(self) -> None:
        """Wait until every page is compressed and written, though not yet on the disk.

        Raises:
            HostFull, ImageUnusable: something could not be written; leave the writer.
        """
        self._pipeline.drain()

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
        at_last: Callable[[], None] = lambda: None,
    ) -> Manifest:
        """Make the generation real: flush, manifest, sync, one rename, sync; and note that.

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
            at_last: called when all is on the disk, before the rename; if it raises, this does.

        Returns:
            The manifest, with its digest.

        Raises:
            HostFull, ImageUnusable: it could not be written.
            ValueError: a run table is wrong, or refers to a parent that does not have the page.
        """
        self.flush()
        self._files.finish()
        fault.reach("image-pages")
        identity = self._identity
        manifest = Manifest(
            format_version=SEALED_VERSION if self._sealed else FORMAT_VERSION,
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
            sealed=self._sealed,
        )
        encoded, digest = encode_manifest(manifest)
        if len(encoded) > MAX_MANIFEST_BYTES:
            raise ImageUnusable(
                str(self._store.path),
                f"the page table would take {len(encoded)} bytes, the limit is"
                f" {MAX_MANIFEST_BYTES}: take a full generation while less is scattered",
            )
        self._check_spaces(spaces)
        self._publish(encoded, at_last)
        manifest = attrs.evolve(manifest, digest=digest)
        self._close(manifest)
        return manifest

    def _publish(self, encoded: bytes, at_last: Callable[[], None]) -> None:
        store = self._store
        store.write_file(self._temporary, MANIFEST_NAME, data=encoded)
        store.sync_directory(self._temporary)
        fault.reach("image-manifest")
        at_last()
        store.rename(self._temporary, generation_name(self.generation))
        fault.reach("image-renamed")
        store.sync_directory()
        try:
            write_newest(store, self._identity.chain_id, self.generation)
        except HostFull as error:
            self.unnoted = error.what
        except ImageUnusable as error:
            self.unnoted = str(error)

    def abort(self) -> None:
        """Give up: release every buffer, end the threads, remove what was written."""
        if self._closed:
            return
        self._close(None)

    def _close(self, manifest: Manifest | None) -> None:
        self._closed = True
        self._pipeline.close()
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
