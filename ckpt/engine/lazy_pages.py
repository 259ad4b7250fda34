"""Where the server of a running process's memory gets pages from: an image, or another host.

The server (`lazy`) knows pages by batches: each has a key and the places that its pages belong to.
Neighbours: `guard` starts the server, `ckpt.migrate.fetching` has pages that are still elsewhere.
"""

from collections.abc import Iterator
from typing import Protocol

import attrs

from ckpt.image.reader import Frame, PageReader, Piece
from ckpt.image.runs import ResolvedRuns
from ckpt.image.store import InUse

Key = tuple[int, int, int]


class LazyPages(Protocol):
    """Pages of one address space that come while it is used; made before the server is forked."""

    @property
    def remedy(self) -> str:
        """What can be done if the process had to be killed: a sentence for the user."""

    @property
    def descriptors(self) -> set[int]:
        """What must stay open in the server."""

    def iter_batches(self) -> Iterator[tuple[Key, list[Piece]]]:
        """Yield all pages, in the order in which they are best put in place. Nothing is read."""

    def fetch(self, key: Key, *, awaited: bool) -> bytes | bytearray:
        """Return the raw pages of a batch.

        Args:
            key: of the batch.
            awaited: somebody stands still until it comes. From one thread; else from any.

        Raises:
            CkptError: it cannot be had, and nobody may ever see zeros instead.
        """

    def finish(self) -> None:
        """Take note that all pages are in place, or not wanted any more."""


@attrs.define(repr=False)
class ImagePages:
    """Pages of an image."""

    reader: PageReader
    runs: ResolvedRuns
    image: str
    """What to call it in messages."""
    use: InUse
    """Keeps what is read from being removed, in the server too."""
    _frames: dict[Key, Frame] = attrs.Factory(dict)

    @property
    def remedy(self) -> str:
        """See `LazyPages`."""
        return f"{self.image} is as it was: restore it again"

    @property
    def descriptors(self) -> set[int]:
        """See `LazyPages`: files are opened when they are read, and must be there then."""
        return {self.use.fd}

    def iter_batches(self) -> Iterator[tuple[Key, list[Piece]]]:
        """See `LazyPages`: a batch is a frame."""
        batches: dict[Key, list[Piece]] = {}
        for frame, pieces in self.reader.iter_frames(self.runs):
            key = (frame.manifest.generation, frame.location.file, frame.location.index)
            self._frames[key] = frame
            batches.setdefault(key, []).extend(pieces)
        # What was written last is what is used: newest generation first, in it as it lies on disk.
        yield from sorted(batches.items(), key=lambda one: (-one[0][0], one[0][1], one[0][2]))

    def fetch(self, key: Key, *, awaited: bool) -> bytes:
        """See `LazyPages`; raises `ImageCorrupt` for a frame that is damaged."""
        del awaited
        return self.reader.decode(self._frames[key])

    def finish(self) -> None:
        """See `LazyPages`."""
