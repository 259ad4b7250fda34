"""Images that people have stay readable: each golden chain, every page of it."""

import pytest

from ckpt.image.access import Access
from ckpt.image.chain import Chain
from ckpt.image.format import Fate, Kind
from ckpt.image.pages import Encoding
from ckpt.image.reader import PageReader
from ckpt.image.verify import verify, verify_for
from tests.image.chain_model import CHAIN_ID, KEY, PAGE, pages_by_frames, pages_by_read, replay
from tests.image.make_golden import CREATED_S, GOLDEN, HISTORY, IMAGES, make_chain

FORMATS = sorted(path.name for path in (IMAGES / "golden").iterdir())


def test_the_present_formats_have_a_golden_chain():
    assert {path.name for path in GOLDEN} <= set(FORMATS)


@pytest.fixture(params=FORMATS)
def golden(request):
    return Chain.open(IMAGES / "golden" / request.param, Access(private=(KEY,)))


@pytest.mark.parametrize("number", range(len(HISTORY)))
def test_every_page_reads_back(golden, number):
    expected = replay(HISTORY, number)
    reader = PageReader(golden, number)
    assert set(reader.manifest.spaces) == set(expected)
    for space, pages in expected.items():
        assert pages_by_read(reader, space, pages) == pages
        assert pages_by_frames(reader, space) == pages


def test_the_facts_read_back(golden):
    assert golden.chain_id == CHAIN_ID
    assert golden.generations() == [0, 1, 2]
    first, second, third = map(golden.manifest, golden.generations())
    assert (first.kind, second.kind, third.kind) == (Kind.FULL, Kind.DELTA, Kind.DELTA)
    assert first.parent is None
    assert second.parent.generation == 0
    assert third.parent.digest == second.digest
    assert third.created_s == CREATED_S + 2
    assert (third.freeze_ms, third.wall_ms) == (1.5, 20.25)
    assert (first.tracker, third.tracker) == ("full", "softdirty")
    assert (first.reason, third.reason) == ("the chain begins here", "")
    assert (third.page_size, third.host, third.records) == (PAGE, {"machine": "x86_64"}, {})
    assert third.totals() == {Fate.PARENT: 6, Fate.DATA: 3, Fate.ZERO: 1, Fate.FILE: 0}


def test_fields_of_later_versions_are_kept(golden):
    assert golden.manifest(1).extra == {
        "later": ["a field that format 1.0 does not know", 1],
    }


def test_nothing_is_found_wrong(golden):
    assert verify(golden) == []
    verify_for(golden, 2, decode=True)


def test_it_covers_both_encodings_and_several_page_files(golden):
    files = golden.manifest(0).page_files
    assert len(files) == 2
    encodings = {Encoding(encoding).inner for encoding in files[0].frames.encodings}
    assert encodings == {Encoding.RAW, Encoding.ZSTD}


def test_the_generator_still_makes_the_same_pages(tmp_path):
    """Not the same bytes: another zstd may compress otherwise."""
    made = Chain.open(make_chain(tmp_path / "made"))
    reader = PageReader(made, 2)
    for space, pages in replay(HISTORY, 2).items():
        assert pages_by_frames(reader, space) == pages
