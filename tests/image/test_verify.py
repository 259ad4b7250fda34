"""What is checked before a restore, and what a full check adds; defects are in test_broken."""

import shutil

import pytest

from ckpt.errors import ImageCorrupt
from ckpt.image.chain import Chain
from ckpt.image.verify import verify, verify_for
from tests.image.chain_model import (
    NoSyncStore,
    add_generation,
    data,
    new_chain,
    pages_by_frames,
    parent,
    soft_page,
)


class CountingStore(NoSyncStore):
    def __init__(self, path):
        super().__init__(path)
        self.reads = []

    def read_part(self, *parts, **where):
        self.reads.append((*parts, where["offset"]))
        return super().read_part(*parts, **where)


@pytest.fixture
def chain(tmp_path):
    """Generation 0 has two frames; generation 1 still needs the second one, 2 none of them."""
    made = new_chain(tmp_path / "chain")
    add_generation(
        made,
        {"mm": [data(0, soft_page(0)), data(5, soft_page(1))]},
        after_run=lambda writer: writer.flush(),
    )
    add_generation(made, {"mm": [data(0, soft_page(2)), parent(5, 1)]}, 0)
    add_generation(made, {"mm": [data(0, soft_page(3))], "mm-2": [data(0, soft_page(4))]}, 1)
    return Chain.open(made.path, make_store=CountingStore)


@pytest.mark.parametrize("decode", [False, True])
def test_only_frames_that_will_be_used_are_read(chain, decode):
    reader = verify_for(chain, 1, decode=decode)
    second = chain.manifest(0).page_files[0].frames.stored_bytes[0]
    assert sorted(chain.store.reads) == [
        ("gen-000000", "pages-0", second),
        ("gen-000001", "pages-0", 0),
    ]
    assert pages_by_frames(reader, "mm") == {0: soft_page(2), 5: soft_page(1)}


def test_a_frame_that_two_spaces_use_is_read_once(chain):
    verify_for(chain, 2)
    assert chain.store.reads == [("gen-000002", "pages-0", 0)]


def test_damage_that_does_not_matter_does_not_stop_a_restore(chain):
    path = chain.path / "gen-000000" / "pages-0"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    verify_for(chain, 1, decode=True)
    verify_for(chain, 2, decode=True)
    with pytest.raises(ImageCorrupt, match="frame 0 at byte 0"):
        verify_for(chain, 0)
    assert [finding.subject for finding in verify(chain)] == ["generation 0"]
    assert verify(chain, [1, 2]) == []


def test_everything_that_is_wrong_is_found_at_once(chain):
    (chain.path / "gen-000000" / "pages-0").unlink()
    (chain.path / "gen-000001" / "manifest").write_bytes(b"nothing")
    findings = verify(Chain.open(chain.path))
    assert [finding.subject for finding in findings] == [
        "generation 0",
        "generation 1",
        "generation 2",
    ]
    assert ["pages-0" in finding.problem for finding in findings] == [True, False, False]


def test_a_generation_is_checked_by_its_number(chain):
    shutil.rmtree(chain.path / "gen-000002")
    (chain.path / "newest").unlink()
    assert verify(Chain.open(chain.path)) == []
    findings = verify(Chain.open(chain.path), [2])
    assert "has no generation 2; it has 0, 1" in str(findings[0])


def test_an_empty_chain_is_all_right(tmp_path):
    assert verify(new_chain(tmp_path / "empty")) == []


def test_a_merge_that_was_killed_is_no_damage_and_what_it_brought_is_told_otherwise(chain):
    stray = chain.path / "gen-000001" / "pages-1"
    stray.write_bytes(b"half of a page")
    left = chain.path / ".tmp-new-gen-000001"
    left.mkdir()
    assert verify(chain) == []
    left.rmdir()
    assert ["pages-1" in finding.problem for finding in verify(chain)] == [True]
