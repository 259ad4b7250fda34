"""Merging generations changes what they are stored in and nothing that they read back as."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import ChainBroken, ImageBusy, ImageCorrupt, NoGeneration
from ckpt.image import placing, squash
from ckpt.image.chain import Chain
from ckpt.image.format import Fate, Kind, RunTableBuilder
from ckpt.image.reader import PageReader
from ckpt.image.verify import verify
from ckpt.image.writer import WriterOptions
from tests.image.chain_model import (
    PAGE,
    NoSyncStore,
    add_generation,
    data,
    file,
    hard_page,
    new_chain,
    pages_by_frames,
    parent,
    replay,
    soft_page,
    zero,
)
from tests.image.histories import histories

HISTORY = [
    (None, {"mm": [data(0, *map(soft_page, range(8))), zero(8, 2), file(10, 1)]}),
    (0, {"mm": [parent(0, 4), data(4, hard_page(14)), parent(5, 6)], "new": [zero(0, 1)]}),
    (1, {"mm": [data(0, soft_page(20)), parent(1, 6), data(7, hard_page(27)), parent(8, 3)]}),
    (2, {"mm": [parent(0, 6), data(6, soft_page(36)), parent(7, 4)]}),
]


def make(path, history=HISTORY, **options):
    made = new_chain(path)
    for above, spaces in history:
        add_generation(made, spaces, above, options=WriterOptions(threads=1, **options))
    return made


@pytest.fixture
def chain(tmp_path):
    return make(tmp_path / "chain")


def assert_replays(path, history, numbers):
    chain = Chain.open(path)
    assert chain.generations() == sorted(numbers)
    assert verify(chain) == []
    for number in numbers:
        reader = PageReader(chain, number)
        expected = replay(history, number)
        assert set(reader.manifest.spaces) == set(expected)
        for space, pages in expected.items():
            assert pages_by_frames(reader, space) == pages


def fold(chain, number, base):
    with chain.lock():
        return squash.fold(chain, number, base)


def inode(chain, number, name):
    return (chain.path / f"gen-{number:06d}" / name).stat().st_ino


@settings(max_examples=40)
@given(
    history=histories(),
    page_file_bytes=st.sampled_from([PAGE, 3 * PAGE, 1 << 30]),
    link_from=st.sampled_from([0, PAGE, 1 << 30]),
    gather=st.sampled_from([0, 2 * PAGE, 1 << 30]),
    data=st.data(),
)
def test_any_fold_reads_as_before(history, page_file_bytes, link_from, gather, data):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "LINK_FROM_BYTES", link_from)
        patch.setattr(squash, "GATHER_BELOW_BYTES", gather)
        chain = make(Path(directory) / "chain", history, page_file_bytes=page_file_bytes)
        parents = dict(enumerate(above for above, _ in history))
        for _ in range(data.draw(st.integers(1, 3))):
            number = data.draw(st.integers(0, len(history) - 1))
            above = squash.ancestors_of(parents, number)
            base = data.draw(st.sampled_from([None, *above]))
            folded = fold(chain, number, base)
            parents[number] = base
            assert folded.kind is (Kind.FULL if base is None else Kind.DELTA)
            assert (folded.parent.generation if folded.parent else None) == base
            assert_replays(chain.path, history, range(len(history)))
        assert all(not chain.list_strays(chain.manifest(n)) for n in chain.generations())


@settings(max_examples=40)
@given(history=histories(), data=st.data())
def test_any_squash_leaves_what_others_need(history, data):
    with tempfile.TemporaryDirectory() as directory:
        chain = make(Path(directory) / "chain", history)
        number = data.draw(st.integers(0, len(history) - 1))
        result = squash.squash(chain, number)
        rest = set(range(len(history))) - set(result.removed)
        assert set(result.removed) | set(result.kept) == set(result.merged)
        assert_replays(chain.path, history, rest)
        assert chain.manifest(number).parent is None
        for one in result.kept:
            assert any(
                one in [m.generation for m in chain.lineage(other)[1:]]
                for other in rest - set(result.merged)
            )


def test_a_chain_becomes_one_generation_that_later_ones_are_based_on(chain):
    result = squash.squash(chain)
    assert (result.generation, result.merged, result.removed) == (3, (0, 1, 2), (0, 1, 2))
    assert_replays(chain.path, HISTORY, [3])
    names = ["CKPT", "gen-000003", "lock", "newest"]
    assert sorted(entry.name for entry in chain.path.iterdir()) == names
    later = [*HISTORY, (3, {"mm": [parent(0, 3), data(3, soft_page(43)), parent(4, 7)]})]
    add_generation(chain, later[4][1], 3)
    assert_replays(chain.path, later, [3, 4])


def test_deltas_on_it_are_not_touched(chain):
    before = (chain.path / "gen-000003" / "manifest").read_bytes()
    known = chain.manifest(2).digest
    result = squash.squash(chain, 2)
    assert result.removed == (0, 1)
    assert (chain.path / "gen-000003" / "manifest").read_bytes() == before
    assert_replays(chain.path, HISTORY, [2, 3])
    assert chain.manifest(2).replaces == (known,)
    assert known in chain.manifest(2).digests
    squash.squash(chain, 3)
    assert_replays(chain.path, HISTORY, [3])


def test_everything_but_pages_and_parent_stays_as_it_was(tmp_path):
    made = new_chain(tmp_path / "chain")
    add_generation(made, HISTORY[0][1])
    facts = {
        "records": {"processes": [1, b"2"]},
        "host": {"pid": 7},
        "created_s": 1234.5,
        "freeze_ms": 2.5,
        "wall_ms": 3.5,
        "tracker": "softdirty",
        "extra": {"later": "kept"},
    }
    add_generation(made, HISTORY[1][1], 0, **facts)
    squash.squash(made)
    found = Chain.open(made.path).manifest(1)
    assert {name: getattr(found, name) for name in facts} == facts


def test_a_generation_that_is_full_is_left_alone(chain):
    before = chain.manifest(0).digest
    result = squash.squash(chain, 0)
    assert (result.merged, result.removed) == ((), ())
    assert Chain.open(chain.path).manifest(0).digest == before
    assert_replays(chain.path, HISTORY, range(4))


def test_ancestors_that_another_branch_needs_stay(chain):
    history = [*HISTORY, (1, {"mm": [parent(0, 11)]})]
    add_generation(chain, history[4][1], 1)
    result = squash.squash(chain, 3)
    assert (result.removed, result.kept) == ((2,), (0, 1))
    assert_replays(chain.path, history, [0, 1, 3, 4])


def test_its_own_page_files_are_not_written_again(chain):
    before = inode(chain, 3, "pages-0")
    squash.squash(chain)
    assert inode(chain, 3, "pages-0") == before
    assert len(chain.manifest(3).page_files) == 2


def test_a_big_page_file_that_is_mostly_needed_is_linked(chain, monkeypatch):
    monkeypatch.setattr(placing, "LINK_FROM_BYTES", 1)
    before = inode(chain, 0, "pages-0")
    fold(chain, 3, None)
    assert inode(chain, 3, "pages-1") == before
    assert_replays(chain.path, HISTORY, range(4))


def test_where_files_cannot_be_linked_they_are_copied(chain, monkeypatch):
    monkeypatch.setattr(placing, "LINK_FROM_BYTES", 1)
    monkeypatch.setattr(NoSyncStore, "link_file", lambda *_: False)
    before = inode(chain, 0, "pages-0")
    fold(chain, 3, None)
    assert inode(chain, 3, "pages-1") != before
    assert_replays(chain.path, HISTORY, range(4))


def test_pages_that_nobody_needs_are_not_copied(chain):
    folded = fold(chain, 3, None)
    live = {run.source for run in folded.spaces["mm"] if run.fate == Fate.DATA}
    assert live
    n_stored = sum(sum(one.frames.n_pages) for one in folded.page_files)
    assert n_stored == 8, "eight pages are DATA to generation 3, three times as many were written"


def test_pages_that_two_processes_share_stay_shared(tmp_path):
    made = new_chain(tmp_path / "chain")
    with made.lock(), made.begin(None, page_size=PAGE) as writer:
        source = writer.write_pages(b"".join(map(soft_page, range(4))))
        tables = {}
        for name, first, n in (("mm-1", 0, 4), ("mm-2", 1, 2)):
            builder = RunTableBuilder(PAGE)
            builder.add(16 * PAGE, n, Fate.DATA, source + first)
            tables[name] = builder.build()
        writer.commit(spaces=tables, records={}, host={}, tracker="full")
    add_generation(made, {"mm-1": [parent(16, 4)], "mm-2": [parent(16, 2)]}, 0)
    squash.squash(made)
    first, second = (made.resolve(1, name) for name in ("mm-1", "mm-2"))
    assert second.sources[0] == first.sources[0] + 1
    assert sum(made.manifest(1).page_files[0].frames.n_pages) == 4


def test_damage_is_found_before_anything_is_changed(chain):
    pages = chain.path / "gen-000000" / "pages-0"
    content = bytearray(pages.read_bytes())
    content[40] ^= 1
    pages.write_bytes(content)
    before = sorted(chain.path.rglob("*"))
    with pytest.raises(ImageCorrupt):
        squash.squash(chain)
    assert sorted(chain.path.rglob("*")) == before
    assert chain.manifest(3).kind is Kind.DELTA


def test_a_base_that_is_no_ancestor_is_refused(chain):
    history = [*HISTORY, (0, {"mm": [parent(0, 11)]})]
    add_generation(chain, history[4][1], 0)
    with pytest.raises(ChainBroken, match="not based on generation 3"):
        fold(chain, 4, 3)
    assert_replays(chain.path, history, range(5))


def test_what_is_not_there_cannot_be_squashed(chain, tmp_path):
    with pytest.raises(NoGeneration, match="it has 0 to 3"):
        squash.squash(chain, 9)
    with pytest.raises(NoGeneration, match="it has none"):
        squash.squash(new_chain(tmp_path / "empty"))


@pytest.mark.parametrize("holder", ["lock", "in_use"])
def test_a_chain_that_is_written_or_read_is_left_alone(chain, holder):
    other = Chain.open(chain.path)
    with getattr(other, holder)(), pytest.raises(ImageBusy):
        squash.squash(chain)
    assert_replays(chain.path, HISTORY, range(4))
    assert squash.squash(chain).removed == (0, 1, 2)


def test_another_chain_object_sees_what_was_squashed_when_it_writes(chain):
    other = Chain.open(chain.path, make_store=NoSyncStore)
    assert other.lineage(3)
    squash.squash(chain)
    later = [*HISTORY, (3, {"mm": [parent(0, 11)]})]
    add_generation(other, later[4][1], 3)
    assert_replays(chain.path, later, [3, 4])
