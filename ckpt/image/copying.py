"""What a copy of a chain is in either direction: which generations, block by block, with a result.

Neighbours: `sending` puts generations into object storage, `fetching` into a directory.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import attrs

from ckpt.errors import ChainBroken, ImageCorrupt, ImageVersion
from ckpt.image.chain import Chain
from ckpt.image.format import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Manifest,
    generation_name,
    page_file_name,
)
from ckpt.image.newest import require_newest
from ckpt.image.pages import (
    FrameIndex,
    FrameLocation,
    UnknownEncoding,
    check_frame,
    decode_frame,
    require_known,
)
from ckpt.image.store import Store
from ckpt.image.workers import iter_ahead
from ckpt.units import GenerationNo

BLOCK_BYTES = 8 << 20
"""Frames are read together up to this: a request to a store takes long, however little it asks."""
N_REQUESTS = 4
"""How many are under way at once."""
FORGET_EVERY = 32
"""Manifests that are remembered, at most: a parent is wanted again, and there may be thousands."""


class ReportProgress(Protocol):
    """What a copy calls now and then."""

    def __call__(self, step: str, done_bytes: int, total_bytes: int | None = None) -> None:
        """Say how far `step` is."""
        ...


def report_nothing(step: str, done_bytes: int, total_bytes: int | None = None) -> None:
    """Be the `ReportProgress` of those whom nobody watches."""


@attrs.frozen
class CopyResult:
    """What was copied.

    Attributes:
        chain_id: of the chain, at both ends.
        copied: generations that are there now and were not, ascending.
        replaced: those that were there as they had been before a merge.
        present: those that were there already.
        copied_bytes: of the files that went over: pages, manifests, and what is beside them in
            object storage.
        kept_bytes: of page files that an interrupted copy had brought there already.
    """

    chain_id: str
    copied: tuple[GenerationNo, ...] = ()
    replaced: tuple[GenerationNo, ...] = ()
    present: tuple[GenerationNo, ...] = ()
    copied_bytes: int = 0
    kept_bytes: int = 0


@attrs.define
class Tally:
    """Counts, and tells how far it is."""

    step: str
    report: ReportProgress
    total_bytes: int = 0
    copied_bytes: int = 0
    kept_bytes: int = 0

    def add(self, n_bytes: int, *, kept: bool = False) -> None:
        """Count what is at the other end now."""
        if kept:
            self.kept_bytes += n_bytes
        else:
            self.copied_bytes += n_bytes
        self.show(0)

    def show(self, under_way_bytes: int) -> None:
        """Tell how far it is, with what is on its way."""
        done = self.copied_bytes + self.kept_bytes + under_way_bytes
        self.report(self.step, done, max(self.total_bytes, done))


def choose(chain: Chain, number: GenerationNo | None) -> list[GenerationNo]:
    """Return all generations, or the lineage of one; ascending, so parents come first.

    Raises:
        NoGeneration: there is none such.
        ChainBroken: all are wanted, and the newest is gone.
        ImageError: the lineage is not whole.
    """
    if number is None:
        require_newest(chain.store, chain.chain_id)
        return chain.generations()
    return sorted(manifest.generation for manifest in chain.lineage(chain.require(number)))


def read_encoded(chain: Chain, manifest: Manifest) -> bytes:
    """Return the manifest as it is stored.

    Raises:
        ImageError: it cannot be read, or is not the one that was read before.
    """
    number = manifest.generation
    data = chain.store.read_file(
        generation_name(number), MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES
    )
    if not data.endswith(manifest.digest):
        raise ChainBroken(
            str(chain.manifest_path(number)), "it has just been replaced: try it again"
        )
    return data


def require_same(chain: Chain, other: Chain) -> None:
    """Refuse to mix two chains.

    Raises:
        ChainBroken: they are two.
    """
    if chain.chain_id != other.chain_id:
        raise ChainBroken(
            str(other.path),
            f"it holds chain {other.chain_id}, {chain.path} is chain {chain.chain_id}: choose"
            " another place",
        )
    if set(chain.recipients) != set(other.recipients):
        raise ChainBroken(
            str(other.path), f"it is encrypted to others than {chain.path}, though it is its chain"
        )


def another(other: Chain, number: GenerationNo, chain: Chain) -> ChainBroken:
    """Return the error for two generations of one number."""
    return ChainBroken(
        str(other.manifest_path(number)),
        f"it is another generation {number} than that of {chain.path}, which has gone its own way"
        " since: choose another place",
    )


@attrs.frozen(repr=False)
class _Block:
    """Frames that lie one behind the other."""

    frames: list[FrameLocation]

    @property
    def offset(self) -> int:
        return self.frames[0].offset

    @property
    def len_bytes(self) -> int:
        last = self.frames[-1]
        return last.offset + last.stored_bytes - self.offset


def _cut(frames: Iterable[FrameLocation]) -> Iterator[_Block]:
    block = _Block([])
    for frame in frames:
        if block.frames and block.len_bytes + frame.stored_bytes > BLOCK_BYTES:
            yield block
            block = _Block([])
        block.frames.append(frame)
    if block.frames:
        yield block


@attrs.frozen(repr=False)
class PageFileReader:
    """Reads a page file of `manifest` from its begin to its end, and checks it.

    Attributes:
        store: where it is.
        folder: what its generation is called there.
        decodes: whether frames are decoded, too, unless they are encrypted to others.
    """

    store: Store
    folder: str
    manifest: Manifest
    decodes: bool = False
    _index: FrameIndex = attrs.field(init=False)

    @_index.default
    def _make_index(self) -> FrameIndex:
        return self.manifest.frame_index()

    def iter_blocks(self, file: int) -> Iterator[bytes | memoryview]:
        """Yield the content in blocks, in order, a few of them read ahead in threads.

        Raises:
            ImageCorrupt: it is missing, of another size, or a frame of it is damaged.
            ImageVersion: a frame is to be decoded, and has an encoding of a later version.
        """
        name = page_file_name(file)
        page_file = self.manifest.page_files[file]
        frames = (self._index.frame(file, number) for number in range(len(page_file.frames)))
        # Says whether it is there and how long it is, should there be no frame.
        self._read(name, 0, 0, page_file.size_bytes)

        def read(block: _Block) -> bytes | memoryview:
            data = self._read(name, block.offset, block.len_bytes, page_file.size_bytes)
            for frame in block.frames:
                self._check(frame, memoryview(data)[frame.offset - block.offset :], name)
            return data

        for _, data in iter_ahead(read, _cut(frames), N_REQUESTS):
            yield data

    def _read(self, name: str, offset: int, len_bytes: int, size_bytes: int) -> bytes | memoryview:
        return self.store.read_part(
            self.folder, name, offset=offset, len_bytes=len_bytes, size_bytes=size_bytes
        )

    def _check(self, frame: FrameLocation, rest: memoryview, name: str) -> None:
        path = str(self.store.path / self.folder / name)
        stored, sealed = rest[: frame.stored_bytes], self.manifest.sealed
        try:
            check_frame(stored, frame.checksum)
            if self.decodes:
                require_known(frame.encoding, sealed=sealed is not None)
            if self.decodes and not self.manifest.is_locked:
                raw_bytes = frame.n_pages * self.manifest.page_size
                seal = sealed.seal if sealed else None
                decode_frame(stored, frame.encoding, raw_bytes, seal, frame.number)
        except UnknownEncoding as error:
            raise ImageVersion(path, str(error), "encodings 0 to 3") from error
        except ValueError as error:
            raise ImageCorrupt(path, f"frame {frame.index}: {error}") from error
