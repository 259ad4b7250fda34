"""A generation that arrives frame by frame, encoded and summed by whoever sends it.

The frames are kept as they come, in one page file; those that nobody will read again (their pages
have been put in place already) leave a hole. The manifest comes last and must tell of exactly these
frames. Neighbours: `writer` makes generations here, `reader` reads this one like any other.
"""

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import attrs

from ckpt.errors import ImageCorrupt, ImageUnusable
from ckpt.image.chain import Chain
from ckpt.image.format import (
    MANIFEST_NAME,
    TEMPORARY_PREFIX,
    Manifest,
    PageFile,
    decode_manifest,
    encode_manifest,
    generation_name,
    page_file_name,
)
from ckpt.image.pages import EncodedFrame, FrameTable
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
            HostFull, ImageUnusable: no room for a file; or the chain is encrypted, and nothing
                readable may come into it.
        """
        if chain.recipients:
            raise ImageUnusable(str(chain.path), "what arrives cannot be encrypted: take another")
        self._chain = chain
        self._store = chain.store
        self._frames = FrameTable()
        self._size_bytes = 0
        self._has_hole = False
        """The file ends before what has arrived does."""
        self._store.make_directory(_TEMPORARY)
        self._fd = self._store.create_file(_TEMPORARY, page_file_name(0))
        self._committed = False

    def append(self, frame: EncodedFrame, n_pages: int, *, keep: bool) -> None:
        """Take the next frame, whose checksum was found right.

        Raises:
            HostFull, ImageUnusable: it cannot be written.
        """
        if keep:
            self._end_hole()
            self._store.append(self._fd, frame.stored)
        else:
            self._has_hole = True
        self._frames.append(n_pages, frame)
        self._size_bytes += len(frame.stored)

    def _end_hole(self) -> None:
        if self._has_hole:
            os.truncate(self._fd, self._size_bytes)
            self._has_hole = False

    def commit(
        self, encoded: bytes, name: str, records: Mapping[str, object] | None = None
    ) -> Manifest:
        """Take the manifest, and make the generation one that can be read.

        Args:
            encoded: what `encode_manifest` made, capped by the caller.
            name: what to call it in messages.
            records: that belong into it; None: it has them, or nobody will ask.

        Raises:
            ImageCorrupt, ImageVersion: it is damaged, or tells of other frames than came.
            HostFull, ImageUnusable: it cannot be written.
        """
        manifest = decode_manifest(encoded, name)
        files = () if not len(self._frames) else (PageFile(self._size_bytes, self._frames),)
        if manifest.page_files != files or manifest.parent is not None:
            raise ImageCorrupt(name, "it tells of other page frames than came")
        if (manifest.chain_id, manifest.generation) != (self._chain.chain_id, NUMBER):
            raise ImageCorrupt(name, "it belongs to another chain")
        if records is not None:
            manifest = attrs.evolve(manifest, records=dict(records))
            encoded, digest = encode_manifest(manifest)
            manifest = attrs.evolve(manifest, digest=digest)
        self._end_hole()
        self._store.close_file(self._fd)
        self._fd = -1
        self._store.write_file(_TEMPORARY, MANIFEST_NAME, data=encoded)
        self._store.rename(_TEMPORARY, generation_name(NUMBER))
        self._store.sync_directory()
        self._committed = True
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
        """Remove what came; does nothing after a commit."""
        if self._fd >= 0:
            self._store.close_file(self._fd)
            self._fd = -1
        if not self._committed:
            self._store.remove_temporary(_TEMPORARY)
