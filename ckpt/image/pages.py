"""Frames: how page content lies in a page file, and the table that finds and checks them.

A page file is frames back to back, each up to 1 MiB of whole pages, each readable without the
others. The frame table is in the manifest (and so under its digest); it says how long each frame
is, how it is encoded, and the checksum of the bytes as they are stored, which is looked at before
anything decodes them. Neighbours: `writer` makes frames, `reader` and `verify` take them apart.
"""

import enum
import threading
import zlib
from array import array
from bisect import bisect_right
from itertools import accumulate
from typing import Protocol, Self

import attrs
import zstandard

from ckpt.image.codec import pack_column, unpack_column
from ckpt.image.keys import SEAL_BYTES

MAX_FRAME_BYTES = 1 << 20
"""Most raw bytes in one frame: what has to be decoded to reach a single page."""

MAX_STORED_BYTES = MAX_FRAME_BYTES + SEAL_BYTES
"""Most bytes of one frame as it is stored; what is not encrypted has `MAX_FRAME_BYTES` at most."""

MIN_PAGE_SIZE = 1 << 12
MAX_PAGE_SIZE = 1 << 16
"""Page sizes that Linux has on the processors it runs on; each is a power of two."""

FRAME_BYTES = 4 + 4 + 4 + 1
"""Packed size of one entry of the frame table."""

SHRINK_NUMERATOR, SHRINK_DENOMINATOR = 15, 16
"""A frame is stored raw unless zstd brings it to this part of its size or less."""


class Encoding(enum.IntEnum):
    """How the bytes of a frame are stored; a later minor version may add some."""

    RAW = 0
    ZSTD = 1
    SEALED_RAW = 2
    SEALED_ZSTD = 3

    @property
    def inner(self) -> "Encoding":
        """How it is stored under the encryption."""
        return _INNER.get(self, self)


_INNER = {Encoding.SEALED_RAW: Encoding.RAW, Encoding.SEALED_ZSTD: Encoding.ZSTD}
_SEALED = {inner: sealed for sealed, inner in _INNER.items()}
_KNOWN = frozenset(Encoding)
_PLAIN = _KNOWN - frozenset(_INNER)


class FrameSeal(Protocol):
    """What encrypts the frames of a generation (`sealing.Seal`)."""

    def seal_frame(self, stored: bytes | memoryview, number: int, encoding: int) -> bytes:
        """Encrypt the frame of that number in its generation."""

    def open_frame(self, stored: bytes | memoryview, number: int, encoding: int) -> bytes:
        """Decrypt it; raises `ValueError` if it is not what was sealed as that frame."""


_RAW = frozenset({Encoding.RAW, Encoding.SEALED_RAW})


class UnknownEncoding(ValueError):
    """A frame is encoded in a way that this ckpt does not know (never leaves the image layer)."""


@attrs.frozen(repr=False)
class FrameTable:
    """The frames of one page file, in file order, as packed columns.

    Attributes:
        n_pages: raw length in pages ('I').
        stored_bytes: length in the file ('I').
        checksums: zlib's CRC-32 of the stored bytes ('I').
        encodings: `Encoding` values ('B').
    """

    n_pages: "array[int]" = attrs.field(factory=lambda: array("I"))
    stored_bytes: "array[int]" = attrs.field(factory=lambda: array("I"))
    checksums: "array[int]" = attrs.field(factory=lambda: array("I"))
    encodings: "array[int]" = attrs.field(factory=lambda: array("B"))

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.n_pages)

    def append(self, n_pages: int, frame: "EncodedFrame") -> None:
        """Add the frame that was written after all others."""
        self.n_pages.append(n_pages)
        self.stored_bytes.append(len(frame.stored))
        self.checksums.append(frame.checksum)
        self.encodings.append(frame.encoding)

    def pack(self) -> bytes:
        """Encode as specified in images/FORMAT.md, "Frame table"."""
        columns = (self.n_pages, self.stored_bytes, self.checksums, self.encodings)
        return b"".join(map(pack_column, columns))

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Self:
        """Decode what `pack` made; `validate` is a step of its own.

        Raises:
            ValueError: `data` is no whole number of frames.
        """
        n_frames, rest = divmod(len(data), FRAME_BYTES)
        if rest:
            raise ValueError(f"a frame table of {len(data)} bytes is no whole number of frames")
        view = memoryview(data)
        width = 4 * n_frames
        return cls(
            unpack_column("I", view[:width]),
            unpack_column("I", view[width : 2 * width]),
            unpack_column("I", view[2 * width : 3 * width]),
            unpack_column("B", view[3 * width :]),
        )

    def validate(self, page_size: int, size_bytes: int, *, sealed: bool = False) -> None:
        """Check the table against the caps and the size of its page file.

        Raises:
            ValueError: a frame is empty or longer than `MAX_FRAME_BYTES`, the frames together
                are not as long as the file, or one is not `sealed` and should be, or the other way.
        """
        most_bytes, seal_bytes = MAX_FRAME_BYTES, 0
        if sealed:
            most_bytes, seal_bytes = MAX_STORED_BYTES, SEAL_BYTES
        if len(self):
            if min(self.n_pages) == 0 or max(self.n_pages) * page_size > MAX_FRAME_BYTES:
                raise ValueError(f"a frame has no pages, or more than {MAX_FRAME_BYTES} bytes")
            if min(self.stored_bytes) <= seal_bytes or max(self.stored_bytes) > most_bytes:
                raise ValueError(f"a frame is stored in 0 or more than {MAX_FRAME_BYTES} bytes")
        for n, stored, encoding in zip(
            self.n_pages, self.stored_bytes, self.encodings, strict=True
        ):
            if (encoding in _INNER) != sealed and encoding in _KNOWN:
                raise ValueError("it has frames with and without encryption")
            if encoding in _RAW and stored != n * page_size + seal_bytes:
                raise ValueError(f"a raw frame of {n} pages is stored in {stored} bytes")
        if sum(self.stored_bytes) != size_bytes:
            raise ValueError(
                f"the frames of a page file add up to {sum(self.stored_bytes)} bytes,"
                f" the file should have {size_bytes}"
            )


@attrs.frozen(slots=True, repr=False)
class FrameLocation:
    """Where one frame is and how it is checked."""

    file: int
    """Index of the page file within the generation."""
    index: int
    """Number of the frame within its page file."""
    number: int
    """The same within its generation."""
    offset: int
    stored_bytes: int
    n_pages: int
    first_page: int
    """Ordinal of its first page in the page stream."""
    checksum: int
    encoding: int


class FrameIndex:
    """Finds the frame of a page ordinal, over all page files of one generation."""

    def __init__(self, tables: list[FrameTable]) -> None:
        """Index `tables`, in the order in which the page stream goes through them."""
        self._tables = tables
        self._first_pages: list[array[int]] = []
        self._offsets: list[array[int]] = []
        first = 0
        for table in tables:
            pages = array("Q", accumulate(table.n_pages, initial=first))
            first = pages[-1]
            self._first_pages.append(pages)
            self._offsets.append(array("Q", accumulate(table.stored_bytes, initial=0)))
        self._first_frames = list(accumulate(map(len, tables), initial=0))
        self._file_starts = [pages[0] for pages in self._first_pages]
        self.n_stream_pages = first
        """Pages in the whole stream."""

    def locate(self, ordinal: int) -> FrameLocation:
        """Return the frame that holds page `ordinal` of the stream.

        Raises:
            IndexError: the stream has no such page.
        """
        if not 0 <= ordinal < self.n_stream_pages:
            raise IndexError(f"page {ordinal} of a stream of {self.n_stream_pages}")
        # An empty page file starts where the next one does; bisect_right passes it by.
        file = bisect_right(self._file_starts, ordinal) - 1
        return self.frame(file, bisect_right(self._first_pages[file], ordinal) - 1)

    def frame(self, file: int, index: int) -> FrameLocation:
        """Return frame `index` of page file `file`."""
        table = self._tables[file]
        return FrameLocation(
            file,
            index,
            self._first_frames[file] + index,
            self._offsets[file][index],
            table.stored_bytes[index],
            table.n_pages[index],
            self._first_pages[file][index],
            table.checksums[index],
            table.encodings[index],
        )


@attrs.frozen(slots=True, repr=False)
class EncodedFrame:
    """A frame ready to be written; `stored` may be the caller's own buffer (raw)."""

    stored: bytes | memoryview
    encoding: Encoding
    checksum: int


_SAMPLE_BYTES = 1 << 13
_SAMPLES_AT = tuple(index * 0x1D000 + index * index * 0x1000 for index in range(8))
_SAMPLE_LEVEL = -1

_of_thread = threading.local()
"""A zstd context must not be used by two threads at once, and is dear to make."""


def _compressor(level: int) -> zstandard.ZstdCompressor:
    made: dict[int, zstandard.ZstdCompressor] = _of_thread.__dict__.setdefault("compressors", {})
    if level not in made:
        made[level] = zstandard.ZstdCompressor(
            level=level, write_checksum=True, write_content_size=True
        )
    return made[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    made: zstandard.ZstdDecompressor | None = getattr(_of_thread, "decompressor", None)
    if made is None:
        made = _of_thread.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_FRAME_BYTES)
    return made


def encode_frame(
    raw: memoryview, level: int | None, seal: FrameSeal | None = None, number: int = 0
) -> EncodedFrame:
    """Compress `raw` (at most `MAX_FRAME_BYTES`, contiguous, bytes), or keep it as it is.

    Without a level it is always kept. With a `seal` it is then encrypted as the frame of that
    number of its generation.

    Runs without the interpreter lock for nearly all of its time. Where zstd gains less than a
    sixteenth, reading the frame back as it is costs less than the bytes saved.
    """
    stored, encoding = _compress(raw, level)
    if seal is not None:
        return seal_encoded(stored, encoding, seal, number)
    return EncodedFrame(stored, encoding, zlib.crc32(stored))


def seal_encoded(
    stored: bytes | memoryview, encoding: int, seal: FrameSeal, number: int
) -> EncodedFrame:
    """Encrypt what is encoded already, as the frame of that number of its generation.

    Raises:
        UnknownEncoding: it is encrypted already, or we cannot decode it.
    """
    require_known(encoding)
    outer = _SEALED[Encoding(encoding)]
    sealed = seal.seal_frame(stored, number, outer)
    return EncodedFrame(sealed, outer, zlib.crc32(sealed))


def _compress(raw: memoryview, level: int | None) -> tuple[bytes | memoryview, Encoding]:
    if level is not None and not _is_incompressible(raw):
        compressed = _compressor(level).compress(raw)
        if len(compressed) * SHRINK_DENOMINATOR <= len(raw) * SHRINK_NUMERATOR:
            return compressed, Encoding.ZSTD
    return raw, Encoding.RAW


def _is_incompressible(raw: memoryview) -> bool:
    """Tell by a sixteenth of a full frame, in pieces, whether zstd would gain nothing.

    Trying on all of it takes as long as the checksum (measured: 0.3 ms each for 1 MiB of noise).
    The pieces lie at uneven distances: what repeats every so many pages must not hide between them.
    """
    if len(raw) < MAX_FRAME_BYTES:
        return False
    sample = b"".join(raw[at : at + _SAMPLE_BYTES] for at in _SAMPLES_AT)
    small = len(_compressor(_SAMPLE_LEVEL).compress(sample))
    return small * SHRINK_DENOMINATOR > len(sample) * SHRINK_NUMERATOR


def check_frame(stored: bytes | memoryview, checksum: int) -> None:
    """Compare the stored bytes with their checksum.

    CRC-32 finds every error of up to 32 bits in a row, so every flipped bit and torn byte; it is no
    protection against someone who means harm, and the decoding does not count on it.

    Raises:
        ValueError: they differ.
    """
    found = zlib.crc32(stored)
    if found != checksum:
        raise ValueError(f"its checksum is {found:08x}, it should be {checksum:08x}")


def require_known(encoding: int, *, sealed: bool = False) -> None:
    """Tell an encoding of a later version from damage.

    Raises:
        UnknownEncoding: we cannot decode it.
    """
    if encoding not in (_INNER if sealed else _PLAIN):
        raise UnknownEncoding(f"encoding {encoding}")


def decode_frame(
    stored: bytes | memoryview,
    encoding: int,
    raw_bytes: int,
    seal: FrameSeal | None = None,
    number: int = 0,
) -> bytes | memoryview:
    """Return the raw pages of a frame whose checksum was found right; `stored` itself if raw.

    With a `seal` it is first decrypted, as the frame of that number of its generation.

    The zstd header is read first: the library allocates what it announces, whatever maximum it is
    given. zstd's own checksum, of the raw bytes, is required and compared by the library.

    Raises:
        ValueError: the bytes do not decode to exactly `raw_bytes`; `UnknownEncoding` if we
            do not know the encoding.
    """
    require_known(encoding, sealed=seal is not None)
    if seal is not None:
        stored = seal.open_frame(stored, number, encoding)
        encoding = Encoding(encoding).inner
    if encoding == Encoding.RAW:
        if len(stored) != raw_bytes:
            raise ValueError(f"raw, with {len(stored)} bytes, it should have {raw_bytes}")
        return stored
    try:
        header = zstandard.get_frame_parameters(stored)
        if header.content_size != raw_bytes or not header.has_checksum or header.dict_id:
            raise ValueError("its zstd header has another size, no checksum, or a dictionary")
        raw: bytes = _decompressor().decompress(
            stored, max_output_size=raw_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ValueError(f"it does not decompress: {error}") from error
    if len(raw) != raw_bytes:
        raise ValueError(f"it decompresses to {len(raw)} bytes, not {raw_bytes}")
    return raw
