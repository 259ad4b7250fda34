"""Any chain reads back as plain Python says it should: `chain_model.replay` is the judge."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ckpt.image.chain import Chain
from ckpt.image.reader import PageReader
from ckpt.image.verify import verify
from ckpt.image.writer import WriterOptions
from tests.image.chain_model import (
    PAGE,
    NoSyncStore,
    add_generation,
    new_chain,
    pages_by_frames,
    pages_by_read,
    replay,
    span,
)
from tests.image.histories import N_PAGES, histories


@given(
    history=histories(),
    threads=st.integers(1, 3),
    page_file_bytes=st.sampled_from([PAGE, 3 * PAGE, 1 << 30]),
    flushes=st.lists(st.booleans(), min_size=1, max_size=8),
    data=st.data(),
)
def test_any_chain_replays(history, threads, page_file_bytes, flushes, data):
    with tempfile.TemporaryDirectory() as directory:
        chain = new_chain(Path(directory) / "chain")
        options = WriterOptions(threads=threads, page_file_bytes=page_file_bytes)
        turn = iter(flushes * 100)
        for above, spaces in history:
            # A flush ends the frame, so runs fall into frames in all kinds of ways.
            add_generation(
                chain,
                spaces,
                above,
                options=options,
                after_run=lambda writer: writer.flush() if next(turn) else None,
            )
        again = Chain.open(chain.path, make_store=NoSyncStore)
        assert again.generations() == list(range(len(history)))
        assert verify(again) == []
        for number in range(len(history)):
            compare(PageReader(again, number, threads=threads), replay(history, number), data)


def compare(reader, expected, data):
    assert set(reader.manifest.spaces) == set(expected)
    for space, pages in expected.items():
        assert pages_by_frames(reader, space) == pages
        assert pages_by_read(reader, space, pages) == pages
        first = data.draw(st.integers(0, N_PAGES - 1))
        n = data.draw(st.integers(0, N_PAGES - first))
        assert pages_in(reader, space, first, n) == {
            page: content
            for page, content in pages.items()
            if first <= page < first + n and reader.resolve(space).lookup(page * PAGE).fate == 1
        }


def pages_in(reader, space, first, n_pages):
    found = {}
    for raw, pieces in reader.iter_data(space, [span(first, n_pages)]):
        for address, offset, len_bytes in pieces:
            for at in range(0, len_bytes, PAGE):
                found[(address + at) // PAGE] = bytes(raw[offset + at : offset + at + PAGE])
    return found
