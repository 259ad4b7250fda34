"""Frames: encoded, checked before they are decoded, found by page."""

import zlib
from array import array

import pytest
import zstandard

from ckpt.image.pages import (
    MAX_FRAME_BYTES,
    Encoding,
    FrameIndex,
    FrameTable,
    UnknownEncoding,
    check_frame,
    decode_frame,
    encode_frame,
)
from tests.image.chain_model import PAGE, hard_page, soft_page


@pytest.mark.parametrize(
    ("raw", "encoding"),
    [(soft_page(1), Encoding.ZSTD), (hard_page(1), Encoding.RAW)],
)
def test_a_frame_comes_back(raw, encoding):
    frame = encode_frame(memoryview(raw), 1)
    assert frame.encoding is encoding
    check_frame(bytes(frame.stored), frame.checksum)
    assert decode_frame(bytes(frame.stored), frame.encoding, len(raw)) == raw


@pytest.mark.parametrize(("n_zeros", "encoding"), [(700, Encoding.RAW), (2000, Encoding.ZSTD)])
def test_a_small_gain_is_not_worth_decompressing(n_zeros, encoding):
    raw = hard_page(3) + hard_page(4) + bytes(n_zeros) + hard_page(5)[n_zeros:]
    assert len(zstandard.ZstdCompressor(level=1).compress(raw)) < len(raw)
    assert encode_frame(memoryview(raw), 1).encoding is encoding


N_FRAME_PAGES = MAX_FRAME_BYTES // PAGE


@pytest.mark.parametrize(
    ("is_soft", "encoding"),
    [
        (lambda _: False, Encoding.RAW),
        (lambda _: True, Encoding.ZSTD),
        (lambda page: page % 2, Encoding.ZSTD),
        (lambda page: page % 8, Encoding.ZSTD),
        (lambda page: page % 64 >= 16, Encoding.ZSTD),
        (lambda page: page < N_FRAME_PAGES // 2, Encoding.ZSTD),
    ],
)
def test_a_full_frame_of_noise_is_kept_as_it_is(is_soft, encoding):
    raw = b"".join((soft_page if is_soft(n) else hard_page)(n) for n in range(N_FRAME_PAGES))
    frame = encode_frame(memoryview(raw), 1)
    assert frame.encoding is encoding
    check_frame(bytes(frame.stored), frame.checksum)
    assert decode_frame(bytes(frame.stored), frame.encoding, len(raw)) == raw


@pytest.mark.parametrize("raw", [soft_page(9), hard_page(9)])
def test_every_single_flipped_bit_is_noticed(raw):
    frame = encode_frame(memoryview(raw), 1)
    stored = bytearray(frame.stored)
    for bit in range(0, len(stored) * 8, 1 if len(stored) < 200 else 37):
        stored[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="checksum"):
            check_frame(bytes(stored), frame.checksum)
        stored[bit // 8] ^= 1 << bit % 8


def compress(raw, **options):
    return zstandard.ZstdCompressor(**{"write_checksum": True, **options}).compress(raw)


@pytest.mark.parametrize(
    ("stored", "encoding", "reason"),
    [
        (compress(bytes(2 * PAGE)), Encoding.ZSTD, "another size"),
        (compress(bytes(PAGE), write_content_size=False), Encoding.ZSTD, "another size"),
        (compress(bytes(PAGE), write_checksum=False), Encoding.ZSTD, "no checksum"),
        (compress(bytes(PAGE)) + b"x", Encoding.ZSTD, "does not decompress"),
        (compress(bytes(PAGE))[:-1], Encoding.ZSTD, "does not decompress"),
        (compress(bytes(PAGE))[:-1] + b"x", Encoding.ZSTD, "does not decompress"),
        (b"not zstd at all", Encoding.ZSTD, "does not decompress"),
        (b"", Encoding.ZSTD, "does not decompress"),
        (bytes(PAGE - 1), Encoding.RAW, "it should have"),
    ],
)
def test_decoding_refuses(stored, encoding, reason):
    with pytest.raises(ValueError, match=reason):
        decode_frame(stored, encoding, PAGE)


def test_an_encoding_of_later_is_told_apart():
    with pytest.raises(UnknownEncoding, match="encoding 7"):
        decode_frame(b"x", 7, PAGE)


def frames(*n_pages):
    table = FrameTable()
    for n in n_pages:
        table.append(n, encode_frame(memoryview(soft_page(n) * n), 1))
    return table


def test_the_table_comes_back():
    table = frames(1, 5, 2)
    assert FrameTable.unpack(table.pack()) == table
    assert len(table.pack()) == 3 * 13
    with pytest.raises(ValueError, match="whole number"):
        FrameTable.unpack(table.pack()[:-1])


def test_every_page_is_found_over_several_files():
    tables = [frames(1, 5), FrameTable(), frames(2, 256)]
    index = FrameIndex(tables)
    assert index.n_stream_pages == 264
    expected = [(0, 0), *[(0, 1)] * 5, *[(2, 0)] * 2, *[(2, 1)] * 256]
    found = [index.locate(ordinal) for ordinal in range(264)]
    assert [(frame.file, frame.index) for frame in found] == expected
    assert found[6].first_page == 6
    assert found[8].offset == tables[2].stored_bytes[0]
    for outside in (-1, 264):
        with pytest.raises(IndexError):
            index.locate(outside)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t.n_pages.__setitem__(0, 0), "has no pages"),
        (lambda t: t.n_pages.__setitem__(0, 257), "more than"),
        (lambda t: t.stored_bytes.__setitem__(0, 0), "stored in 0"),
        (lambda t: t.stored_bytes.__setitem__(0, 1 << 21), "more than"),
        (lambda t: t.stored_bytes.__setitem__(0, 5), "add up"),
        (lambda t: t.encodings.__setitem__(0, 0), "raw frame"),
    ],
)
def test_the_table_is_checked_before_it_is_used(spoil, reason):
    table = frames(3, 4)
    size = sum(table.stored_bytes)
    table.validate(PAGE, size)
    spoil(table)
    with pytest.raises(ValueError, match=reason):
        table.validate(PAGE, size)


def test_the_checksum_is_the_crc_that_zlib_has():
    frame = encode_frame(memoryview(hard_page(2)), 1)
    assert frame.checksum == zlib.crc32(hard_page(2))
    assert array("I", [frame.checksum])[0] == frame.checksum
