"""Any chain reads back as plain Python says it should: `chain_model.replay` is the judge."""

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ckpt.image.chain import Chain
from ckpt.image.format import Fate
from ckpt.image.reader import PageReader
from ckpt.image.verify import verify
from ckpt.image.writer import WriterOptions
from tests.image.chain_model import (
    PAGE,
    ModelRun,
    NoSyncStore,
    add_generation,
    hard_page,
    new_chain,
    pages_by_frames,
    pages_by_read,
    replay,
    soft_page,
    span,
)

N_PAGES = 12
SPACES = ("mm-1", "mm-2")
HOLE = None


def runs_of(fates, contents):
    """Join neighbours of the same fate into runs, as a dump does."""
    runs = []
    for page, fate in enumerate(fates):
        if fate is HOLE:
            continue
        content = contents[page] if fate == Fate.DATA else b""
        last = runs[-1] if runs else None
        if last is not None and last.fate == fate and last.page + last.n_pages == page:
            runs[-1] = ModelRun(last.page, last.n_pages + 1, fate, last.content + content)
        else:
            runs.append(ModelRun(page, 1, fate, content))
    return runs


@st.composite
def histories(draw):
    history = []
    seed = 0
    for number in range(draw(st.integers(1, 5))):
        above = draw(st.none() | st.integers(0, number - 1)) if number else None
        inherited = {} if above is None else replay(history, above)
        spaces = {}
        for space in SPACES[: draw(st.integers(0, len(SPACES)))]:
            fates, contents = [], []
            for page in range(N_PAGES):
                choices = [HOLE, Fate.DATA, Fate.ZERO, Fate.FILE]
                if page in inherited.get(space, {}):
                    # More of these: chains are mostly unchanged pages.
                    choices += [Fate.PARENT] * 6
                fates.append(draw(st.sampled_from(choices)))
                seed += 1
                contents.append(soft_page(seed) if seed % 3 else hard_page(seed))
            spaces[space] = runs_of(fates, contents)
        history.append((above, spaces))
    return history


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
