"""A generation that arrives frame by frame, encoded and summed by whoever sends it.

The frames are kept as they come, in one page file; those that nobody will read again (their pages
have been put in place already) leave a hole. The manifest comes last and must tell of exactly these
frames.

In an encrypted chain every frame is sealed before it is stored, under the key of the generation,
which is made here; the manifest is then written with the frames as they are stored, and sealed.

Neighbours: `writer` makes generations here, `reader` reads this one like any other.
"""

import contextlib
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import attrs

from ckpt.errors import HostFull, ImageCorrupt, ImageUnusable
from ckpt.image.chain import Chain
from ckpt.image.format import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SEALED_VERSION,
    TEMPORARY_PREFIX,
    Manifest,
    PageFile,
    decode_manifest,
    encode_manifest,
    generation_name,
    page_file_name,
)
from ckpt.image.newest import write_newest
from ckpt.image.pages import EncodedFrame, FrameTable, seal_encoded
from ckpt.image.runs import RunTable
from ckpt.image.sealing import Seal
from ckpt.units import GenerationNo

NUMBER = GenerationNo(0)
"""What arrives is the first of its chain."""
_TEMPORARY = TEMPORARY_PREFIX + generation_name(NUMBER)


class Arriving:
    """One generation on its way in; a context manager. Left without `commit`, nothing is there."""

    def __init__(self, chain: Chain) -> None:
        """Begin the first generation of a chain that has none.

        State: inside `Chain.lock`.

        Raises:
            HostFull, ImageUnusable: no room for a file.
            ImageCorrupt: nobody can be a recipient of the chain.
        """
        self._chain = chain
        self._store = chain.store
        self._sealed = chain.seal_new(NUMBER)
        self._came = FrameTable()
        """As the source tells of them."""
        self._came_bytes = 0
        self._frames = FrameTable() if self._sealed else self._came
        """As they are stored."""
        self._size_bytes = 0
        self._has_hole = False
        """The file ends before what has arrived does."""
        self._store.make_directory(_TEMPORARY)
        self._fd = self._store.create_file(_TEMPORARY, page_file_name(0))
        self._committed = False

    def append(self, frame: EncodedFrame, n_pages: int, *, keep: bool) -> None:
        """Take the next frame, whose checksum was found right.

        What is encrypted is kept in any case.

        Raises:
            ImageCorrupt: it is of an encoding that cannot be sealed.
            HostFull, ImageUnusable: it cannot be written.
        """
        self._came.append(n_pages, frame)
        self._came_bytes += len(frame.stored)
        if self._sealed is not None and self._sealed.seal is not None:
            frame = self._seal(frame, self._sealed.seal)
            self._frames.append(n_pages, frame)
            keep = True
        if keep:
            self._end_hole()
            self._store.append(self._fd, frame.stored)
        else:
            self._has_hole = True
        self._size_bytes += len(frame.stored)

    def _seal(self, frame: EncodedFrame, seal: Seal) -> EncodedFrame:
        number = len(self._frames)
        try:
            return seal_encoded(frame.stored, frame.encoding, seal, number)
        except ValueError as error:
            raise ImageCorrupt("what came", f"frame {number}: {error}") from error

    def _end_hole(self) -> None:
        if self._has_hole:
            os.truncate(self._fd, self._size_bytes)
            self._has_hole = False

    def commit(
        self,
        encoded: bytes,
        name: str,
        spaces: Mapping[str, RunTable],
        records: Mapping[str, object] | None = None,
    ) -> Manifest:
        """Take the manifest, and make the generation one that can be read.

        Args:
            encoded: what `encode_manifest` made, capped by the caller.
            name: what to call it in messages.
            spaces: the run tables, made of what came.
            records: that belong into it; None: it has them, or nobody will ask.

        Raises:
            ImageCorrupt, ImageVersion: it is damaged, or tells of other frames than came.
            HostFull, ImageUnusable: it cannot be written, or its page table is too long.
        """
        manifest = decode_manifest(encoded, name)
        came = () if not len(self._came) else (PageFile(self._came_bytes, self._came),)
        if manifest.page_files != came or manifest.parent is not None:
            raise ImageCorrupt(name, "it tells of other page frames than came")
        if (manifest.chain_id, manifest.generation) != (self._chain.chain_id, NUMBER):
            raise ImageCorrupt(name, "it belongs to another chain")
        if any(table.page_size != manifest.page_size for table in spaces.values()):
            raise ImageCorrupt(name, "its pages have another size than those that came")
        manifest = attrs.evolve(manifest, spaces=spaces)
        if records is not None:
            manifest = attrs.evolve(manifest, records=dict(records))
        if self._sealed is not None:
            manifest = attrs.evolve(
                manifest,
                format_version=SEALED_VERSION,
                sealed=self._sealed,
                page_files=(PageFile(self._size_bytes, self._frames),) if came else (),
            )
        encoded, digest = encode_manifest(manifest)
        if len(encoded) > MAX_MANIFEST_BYTES:
            raise ImageUnusable(name, f"its page table would take {len(encoded)} bytes")
        manifest = attrs.evolve(manifest, digest=digest)
        self._end_hole()
        self._store.close_file(self._fd)
        self._fd = -1
        self._store.write_file(_TEMPORARY, MANIFEST_NAME, data=encoded)
        self._store.rename(_TEMPORARY, generation_name(NUMBER))
        self._store.sync_directory()
        self._committed = True
        if self._sealed is not None:
            self._chain.remember(manifest)
        return manifest

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what came; after a commit, note that it is there."""
        if self._fd >= 0:
            self._store.close_file(self._fd)
            self._fd = -1
        if not self._committed:
            self._store.remove_temporary(_TEMPORARY)
            return
        # Not within the commit: the tree stands still then, and this can wait.
        with contextlib.suppress(HostFull, ImageUnusable):
            write_newest(self._store, self._chain.chain_id, NUMBER)
