"""Reading pages back, as one generation saw them, from whichever generation holds them.

Big reads go frame by frame: each frame is read, checked and decompressed once, in threads, a few
ahead, and comes with the list of places that its pages belong to. Nothing is done per page.
Neighbours: `chain` checks manifests and resolves runs; `verify` walks the same frames without
wanting their content.
"""

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import attrs

from ckpt.errors import ImageCorrupt, ImageVersion
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest, generation_name, page_file_name
from ckpt.image.pages import (
    MAX_STORED_BYTES,
    FrameIndex,
    FrameLocation,
    UnknownEncoding,
    check_frame,
    decode_frame,
    require_known,
)
from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.image.workers import DEFAULT_THREADS, for_each, iter_ahead
from ckpt.units import AddrRange, GenerationNo, RemoteAddr

FRAMES_KEPT = 4
"""Decompressed frames that `PageReader.read` remembers, at most 1 MiB each."""

_FEW_FRAMES = 2
"""So many are decoded sooner than threads for them have started."""

Piece = tuple[RemoteAddr, int, int]
"""Where a part of a frame belongs: address, offset in the frame, length, all in bytes."""


@attrs.frozen(repr=False)
class Frame:
    """One frame of one generation, with what is needed to read it."""

    manifest: Manifest
    location: FrameLocation


@attrs.frozen(slots=True, repr=False)
class _Needed:
    """A frame and the pieces of it that somebody wants."""

    frame: Frame
    pieces: list[Piece]


_of_thread = threading.local()
"""Fresh memory is dearer than reading into it: each thread reads into the same all the time."""


def _room() -> bytearray:
    made: bytearray | None = getattr(_of_thread, "room", None)
    if made is None:
        made = _of_thread.room = bytearray(MAX_STORED_BYTES)
    return made


def check_stored(chain: Chain, frame: Frame) -> None:
    """Compare the checksum of the stored bytes of a frame; safe in any thread.

    Raises:
        ImageCorrupt, ImageVersion: see `read_stored`.
    """
    read_stored(chain, frame, _room())


def read_checked(chain: Chain, frame: Frame) -> bytes | memoryview:
    """Read and decode a frame that `check_stored` has found right a moment ago.

    Its checksum is not compared again: that would cost a third of filling a process.

    Returns:
        Its raw pages, in memory that the next call in this thread uses again.

    Raises:
        ImageCorrupt: it does not decode, or zstd's own checksum is wrong.
        ImageSealed: it is encrypted, and the chain has no private key for it.
    """
    return _decode(chain, frame, _read(chain, frame, _room()))


def _decode(chain: Chain, frame: Frame, stored: bytes | memoryview) -> bytes | memoryview:
    location, manifest = frame.location, frame.manifest
    seal = chain.seal_of(manifest)
    with _errors(chain, frame):
        return decode_frame(
            stored,
            location.encoding,
            location.n_pages * manifest.page_size,
            seal,
            location.number,
        )


def _read(chain: Chain, frame: Frame, room: bytearray | None) -> bytes | memoryview:
    location = frame.location
    return chain.store.read_part(
        generation_name(frame.manifest.generation),
        page_file_name(location.file),
        offset=location.offset,
        len_bytes=location.stored_bytes,
        size_bytes=frame.manifest.page_files[location.file].size_bytes,
        into=room,
    )


def read_stored(chain: Chain, frame: Frame, room: bytearray | None = None) -> bytes | memoryview:
    """Read the stored bytes of a frame and compare their checksum; safe in any thread.

    Raises:
        ImageCorrupt: the file is missing or of another size, or the checksum is wrong.
        ImageVersion: it has an encoding of a later version.
    """
    stored = _read(chain, frame, room)
    with _errors(chain, frame):
        check_frame(stored, frame.location.checksum)
        require_known(frame.location.encoding, sealed=frame.manifest.sealed is not None)
    return stored


def read_frame(chain: Chain, frame: Frame) -> bytes:
    """Read, check and decode a frame; safe in any thread.

    Returns:
        Its raw pages.

    Raises:
        ImageCorrupt, ImageVersion: see `read_stored`; or it does not decode.
        ImageSealed: see `read_checked`.
    """
    return bytes(_decode(chain, frame, read_stored(chain, frame)))


@contextlib.contextmanager
def _errors(chain: Chain, frame: Frame) -> Iterator[None]:
    location = frame.location
    path = str(
        chain.path / generation_name(frame.manifest.generation) / page_file_name(location.file)
    )
    try:
        yield
    except UnknownEncoding as error:
        raise ImageVersion(path, str(error), "encodings 0 to 3") from error
    except ValueError as error:
        raise ImageCorrupt(
            path, f"frame {location.index} at byte {location.offset}: {error}"
        ) from error


class PageReader:
    """The pages of one generation; keeps no file open."""

    def __init__(
        self, chain: Chain, generation: GenerationNo, *, threads: int = DEFAULT_THREADS
    ) -> None:
        """Check the lineage of `generation`.

        Raises:
            NoGeneration, ImageCorrupt, ImageVersion, ChainBroken: see `Chain.lineage`.
        """
        self._chain = chain
        self._threads = threads
        self._line = {manifest.generation: manifest for manifest in chain.lineage(generation)}
        self._indexes: dict[GenerationNo, FrameIndex] = {}
        self._kept: OrderedDict[tuple[GenerationNo, int, int], bytes] = OrderedDict()
        self.manifest = self._line[generation]
        """The manifest of the generation that is read."""

    @property
    def chain(self) -> Chain:
        """Where it reads."""
        return self._chain

    @property
    def is_open(self) -> bool:
        """Whether all can be read: nothing of the lineage is encrypted to others than us."""
        return not any(manifest.is_locked for manifest in self._line.values())

    def resolve(self, space: str) -> ResolvedRuns:
        """Return every run of `space`, with `PARENT` replaced by what the newest ancestor has.

        Raises:
            ImageCorrupt: the generation has no such space.
            ChainBroken: a page is said to be in a parent that does not have it.
        """
        return self._chain.resolve(self.manifest.generation, space)

    def iter_frames(self, runs: ResolvedRuns) -> Iterator[tuple[Frame, list[Piece]]]:
        """Yield the frames that hold the `DATA` pages of `runs`, each once, with their pieces.

        In the order in which they lie on disk, oldest generation first. Nothing is read. (If runs
        share pages of a frame, which our writer never makes, a frame may come twice.)
        """
        columns = (runs.starts, runs.n_pages, runs.generations, runs.sources)
        starts, n_pages, generations, sources = columns
        data = (index for index, fate in enumerate(runs.fates) if fate == Fate.DATA)
        order = sorted(data, key=lambda index: (generations[index], sources[index]))
        needed: _Needed | None = None
        for index in order:
            generation = GenerationNo(generations[index])
            address, source, left = starts[index], sources[index], n_pages[index]
            while left:
                if needed is None or not _holds(needed.frame, generation, source):
                    if needed is not None:
                        yield needed.frame, needed.pieces
                    needed = _Needed(self._locate(generation, source), [])
                taken = _add_piece(needed, address, source, left)
                address += taken * runs.page_size
                source += taken
                left -= taken
        if needed is not None:
            yield needed.frame, needed.pieces

    def _locate(self, generation: GenerationNo, source: int) -> Frame:
        manifest = self._line[generation]
        index = self._indexes.get(generation)
        if index is None:
            index = self._indexes[generation] = manifest.frame_index()
        return Frame(manifest, index.locate(source))

    def iter_data(
        self, space: str, wanted: Iterable[AddrRange] | None = None
    ) -> Iterator[tuple[memoryview, list[Piece]]]:
        """Yield each frame that holds `DATA` pages of `space`, raw, with the pieces of it.

        One `process_vm_writev` a frame can fill a process with it. Pages of other fates do not
        appear: their place is in `resolve`. A few frames are decompressed ahead in threads; memory
        is bounded. The view stays valid as long as it is held.

        Args:
            space: name of the page space.
            wanted: ascending, disjoint, page aligned; everything if not given.

        Raises:
            ImageCorrupt, ImageVersion, ChainBroken: at once for the tables, at its turn for a
                frame.
        """
        runs = self.resolve(space)
        if wanted is not None:
            runs = runs.clip(wanted)
        return self._iter_decoded(runs)

    def decode(self, frame: Frame) -> bytes:
        """Return the raw pages of one of `iter_frames`, checked; safe in any thread.

        Raises:
            ImageCorrupt, ImageVersion: see `read_frame`.
        """
        return read_frame(self._chain, frame)

    def for_each_frame(
        self, runs: ResolvedRuns, use: Callable[[memoryview, list[Piece]], None]
    ) -> None:
        """Call `use`, in threads, with each frame that holds `DATA` pages of `runs`, in any order.

        The frames must have been checked (`verify_for`). The view is valid during the call.

        Raises:
            ImageCorrupt: see `read_checked`; and whatever `use` raises. The rest is not done then.
        """

        def work(item: tuple[Frame, list[Piece]]) -> None:
            frame, pieces = item
            use(memoryview(read_checked(self._chain, frame)), pieces)

        frames = self.iter_frames(runs)
        first = list(itertools.islice(frames, _FEW_FRAMES + 1))
        if len(first) <= _FEW_FRAMES:
            for item in first:
                work(item)
        else:
            for_each(work, itertools.chain(first, frames), self._threads)

    def _iter_decoded(self, runs: ResolvedRuns) -> Iterator[tuple[memoryview, list[Piece]]]:
        ahead = iter_ahead(
            lambda item: read_frame(self._chain, item[0]), self.iter_frames(runs), self._threads
        )
        with contextlib.closing(ahead):
            for (_, pieces), raw in ahead:
                yield memoryview(raw), pieces

    def read(self, space: str, span: AddrRange) -> bytes:
        """Return the bytes of `span`, for comparing and for small looks; keeps a few frames.

        `ZERO` pages are zeros, and so are `FILE` pages: the image does not hold them.

        Args:
            space: name of the page space.
            span: any byte range that the space covers without holes.

        Raises:
            ValueError: there is a hole in `span`.
            ImageCorrupt, ImageVersion, ChainBroken: see `iter_data`.
        """
        size = self.manifest.page_size
        first = span.start // size * size
        aligned = AddrRange(RemoteAddr(first), RemoteAddr(-(-span.end // size) * size))
        runs = self.resolve(space).clip([aligned])
        if sum(runs.n_pages) * size != aligned.len_bytes:
            raise ValueError(f"{span} of {space!r} is not mapped as a whole")
        content = bytearray(aligned.len_bytes)
        for frame, pieces in self.iter_frames(runs):
            raw = self._read_kept(frame)
            for address, offset, len_bytes in pieces:
                at = address - first
                content[at : at + len_bytes] = raw[offset : offset + len_bytes]
        return bytes(content[span.start - first : span.end - first])

    def _read_kept(self, frame: Frame) -> bytes:
        key = (frame.manifest.generation, frame.location.file, frame.location.index)
        raw = self._kept.get(key)
        if raw is None:
            raw = self._kept[key] = read_frame(self._chain, frame)
            if len(self._kept) > FRAMES_KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return raw


def _holds(frame: Frame, generation: GenerationNo, source: int) -> bool:
    location = frame.location
    return (
        frame.manifest.generation == generation
        and location.first_page <= source < location.first_page + location.n_pages
    )


def _add_piece(needed: _Needed, address: int, source: int, wanted: int) -> int:
    """Add as much of a run as the frame holds; return how many pages that is."""
    location, size = needed.frame.location, needed.frame.manifest.page_size
    skipped = source - location.first_page
    taken = min(wanted, location.n_pages - skipped)
    needed.pieces.append((RemoteAddr(address), skipped * size, taken * size))
    return taken
