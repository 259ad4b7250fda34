"""Reading frame by frame: each once, only those needed, and errors at their turn."""

import threading

import pytest

from ckpt.errors import ImageCorrupt
from ckpt.image.chain import Chain
from ckpt.image.reader import FRAMES_KEPT, PageReader
from ckpt.units import addr_range
from tests.image.chain_model import (
    PAGE,
    NoSyncStore,
    add_generation,
    data,
    file,
    hard_page,
    new_chain,
    parent,
    soft_page,
    span,
    zero,
)


class CountingStore(NoSyncStore):
    def __init__(self, path):
        super().__init__(path)
        self.reads = []

    def read_part(self, *parts, **where):
        self.reads.append((parts[0], where["offset"]))
        return super().read_part(*parts, **where)


N_FRAMES = 12


@pytest.fixture
def chain(tmp_path):
    """Frames of 64 pages each in generation 0, of which generation 1 replaces every eighth page."""
    made = new_chain(tmp_path / "chain")
    first = [data(n * 64, *[soft_page(n * 64 + page) for page in range(64)]) for n in range(12)]
    add_generation(made, {"mm": first}, after_run=lambda writer: writer.flush())
    second = []
    for page in range(0, N_FRAMES * 64, 8):
        second += [data(page, hard_page(page)), parent(page + 1, 7)]
    add_generation(made, {"mm": second}, 0)
    return Chain.open(made.path, make_store=CountingStore)


def content_of(page):
    return hard_page(page) if page % 8 == 0 else soft_page(page)


def test_each_frame_is_read_once(chain):
    reader = PageReader(chain, 1)
    seen = {}
    for raw, pieces in reader.iter_data("mm"):
        for address, offset, len_bytes in pieces:
            for at in range(0, len_bytes, PAGE):
                seen[(address + at) // PAGE] = bytes(raw[offset + at : offset + at + PAGE])
    assert seen == {page: content_of(page) for page in range(N_FRAMES * 64)}
    reads = chain.store.reads
    assert len(reads) == len(set(reads))
    assert len([read for read in reads if read[0] == "gen-000000"]) == N_FRAMES


def test_frames_come_in_the_order_of_the_disk(chain):
    reader = PageReader(chain, 1)
    frames = [frame for frame, _ in reader.iter_frames(reader.resolve("mm"))]
    places = [(frame.manifest.generation, frame.location.offset) for frame in frames]
    assert places == sorted(places)
    assert chain.store.reads == []


def test_only_frames_that_are_wanted_are_read(chain):
    reader = PageReader(chain, 1)
    found = list(reader.iter_data("mm", [span(65, 2), span(70, 1)]))
    assert len(found) == 1
    raw, pieces = found[0]
    assert pieces == [(65 * PAGE, PAGE, 2 * PAGE), (70 * PAGE, 6 * PAGE, PAGE)]
    assert len(raw) == 64 * PAGE
    assert len(chain.store.reads) == 1


def test_a_reader_left_early_ends_its_threads(chain):
    before = threading.active_count()
    pieces = PageReader(chain, 1).iter_data("mm")
    next(pieces)
    assert threading.active_count() > before
    pieces.close()
    assert threading.active_count() == before
    assert len(chain.store.reads) < N_FRAMES


def test_read_crosses_runs_frames_and_generations_at_any_byte(chain):
    whole = b"".join(content_of(page) for page in range(N_FRAMES * 64))
    reader = PageReader(chain, 1)
    for start, n in ((0, 1), (PAGE - 1, 2), (63 * PAGE + 7, 5 * PAGE), (0, len(whole))):
        assert reader.read("mm", addr_range(start, n)) == whole[start : start + n]
    assert reader.read("mm", addr_range(5, 0)) == b""


def test_small_reads_remember_a_few_frames(chain):
    reader = PageReader(chain, 0)
    for page in (1, 2, 65, 1, 130, 195, 66):
        reader.read("mm", addr_range(page * PAGE, PAGE))
    assert len(chain.store.reads) == FRAMES_KEPT
    reader.read("mm", addr_range(300 * PAGE, PAGE))
    reader.read("mm", addr_range(66 * PAGE, PAGE))
    assert len(chain.store.reads) == FRAMES_KEPT + 1


def test_zero_and_file_pages_read_as_zeros_and_a_hole_is_refused(tmp_path):
    made = new_chain(tmp_path / "small")
    add_generation(
        made, {"mm": [zero(0, 1), file(1, 1), data(2, soft_page(1)), data(4, soft_page(2))]}
    )
    reader = PageReader(made, 0)
    assert reader.read("mm", span(0, 3)) == bytes(2 * PAGE) + soft_page(1)
    with pytest.raises(ValueError, match="not mapped as a whole"):
        reader.read("mm", span(2, 3))


def test_a_damaged_frame_is_told_at_its_turn_and_the_others_come(chain):
    path = chain.path / "gen-000000" / "pages-0"
    content = bytearray(path.read_bytes())
    frames = chain.manifest(0).page_files[0].frames
    content[sum(frames.stored_bytes[:5]) + 3] ^= 1
    path.write_bytes(content)
    came = []

    def restore():
        for _, pieces in PageReader(chain, 0).iter_data("mm"):
            came.append(pieces[0][0])

    with pytest.raises(ImageCorrupt, match="pages-0 is damaged: frame 5 at byte"):
        restore()
    assert came == [n * 64 * PAGE for n in range(5)]


def test_an_old_generation_reads_as_it_was(chain):
    reader = PageReader(chain, 0)
    assert reader.read("mm", span(0, 9)) == b"".join(soft_page(page) for page in range(9))
