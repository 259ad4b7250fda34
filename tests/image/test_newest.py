"""The promise: a newest generation that was taken away as a whole is missed."""

import os
import shutil

import pytest

from ckpt.errors import ChainBroken, ImageCorrupt, ImageUntrusted, NoGeneration
from ckpt.image.access import Access
from ckpt.image.chain import Chain
from ckpt.image.fetching import fetch
from ckpt.image.newest import (
    MAX_NEWEST_BYTES,
    decode_newest,
    encode_newest,
    read_newest,
    require_newest,
)
from ckpt.image.objects import Objects
from ckpt.image.prune import Retention, prune
from ckpt.image.remote import open_remote
from ckpt.image.sending import send
from ckpt.image.squash import squash
from ckpt.image.verify import verify, verify_for
from tests.image.bucket import Bucket
from tests.image.chain_model import (
    CHAIN_ID,
    KEY,
    NoSyncStore,
    add_generation,
    data,
    new_chain,
    pages_by_frames,
    parent,
    replay,
    soft_page,
)
from tests.image.test_crash import run_in_child
from tests.image.test_crash_keeping import DisorderStore, PowerCutStore
from tests.image.test_sealed import arrive
from tests.plugins.tree import TOP

HISTORY = [
    (None, {"mm": [data(0, soft_page(1), soft_page(2))]}),
    (0, {"mm": [data(0, soft_page(3)), parent(1, 1)]}),
    (0, {"mm": [parent(0, 1), data(1, soft_page(4))]}),
]
GOLDEN = TOP / "images" / "golden" / "format-1.0"


def make(path, n_generations=3):
    made = new_chain(path)
    for above, spaces in HISTORY[:n_generations]:
        add_generation(made, spaces, above)
    return made


@pytest.fixture
def chain(tmp_path):
    return make(tmp_path / "chain")


def lose(chain, *numbers):
    for number in numbers:
        shutil.rmtree(chain.path / f"gen-{number:06d}")
    return Chain.open(chain.path, make_store=NoSyncStore)


def noted(chain):
    return read_newest(chain.store, chain.chain_id)


def findings_of(chain):
    return [str(finding) for finding in verify(chain)]


def assert_reads(chain, number):
    reader = verify_for(chain, number, decode=True)
    for space, pages in replay(HISTORY, number).items():
        assert pages_by_frames(reader, space) == pages


# -- it is missed --------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
def test_a_newest_that_is_gone_is_found(tmp_path, sealed):
    path = tmp_path / "chain"
    to = (KEY.recipient,) if sealed else ()
    chain = Chain.create_or_open(path, encrypt_to=to, make_store=NoSyncStore)
    for above, spaces in HISTORY:
        add_generation(chain, spaces, above)
    assert (noted(chain), findings_of(chain), chain.require(None)) == (2, [], 2)
    chain = lose(chain, 2)
    gone = (
        f"{path}/gen-000002/manifest: it was the newest generation, and is gone: put it back, or"
        " take the newest that is left with --at 1 (if it was removed on purpose, remove"
        f" {path}/newest, too)"
    )
    assert findings_of(chain) == [f"newest generation: {gone}"]
    with pytest.raises(ChainBroken) as caught:
        chain.require(None)
    assert str(caught.value) == gone


def test_what_is_left_can_be_had_by_its_number(chain):
    chain = lose(chain, 2)
    assert chain.require(1) == 1
    assert_reads(chain, 1)
    with pytest.raises(NoGeneration, match="has no generation 2; it has 0, 1"):
        chain.require(2)


def test_several_are_missed_and_so_are_all(chain):
    left = lose(chain, 1, 2)
    assert "take the newest that is left with --at 0 " in findings_of(left)[0]
    (found,) = findings_of(lose(chain, 0))
    assert "put it back, there is no other (if" in found


def test_put_back_it_is_the_newest_again(chain):
    (chain.path / "gen-000002").rename(chain.path.parent / "aside")
    assert findings_of(chain) != []
    (chain.path.parent / "aside").rename(chain.path / "gen-000002")
    assert (findings_of(chain), chain.require(None)) == ([], 2)


def test_removed_on_purpose_with_its_note_it_is_not_missed(chain):
    chain = lose(chain, 2)
    (chain.path / "newest").unlink()
    assert (findings_of(chain), chain.require(None)) == ([], 1)


# -- and its number is never given again ---------------------------------------------------------


def test_a_number_that_is_lost_is_not_given_again(chain):
    chain = lose(chain, 1, 2)
    assert chain.next_number() == 3
    assert add_generation(chain, HISTORY[1][1], 0).generation == 3
    assert (noted(chain), findings_of(chain), chain.require(None)) == (3, [], 3)


def test_a_chain_that_has_lost_all_does_not_begin_anew(chain):
    chain = lose(chain, 0, 1, 2)
    assert (chain.generations(), chain.next_number()) == ([], 3)


def test_nothing_more_is_removed_from_a_chain_that_has_lost_its_newest(chain):
    chain = lose(chain, 2)
    for job in (squash, lambda chain: prune(chain, Retention(keep_last=1))):
        with pytest.raises(ChainBroken, match="was the newest generation, and is gone"):
            job(chain)
        assert chain.generations() == [0, 1]
    assert squash(chain, 1).removed == (0,)


def test_removing_the_others_leaves_the_newest_and_its_note(chain):
    prune(chain, Retention(keep_last=1))
    assert (chain.generations(), noted(chain), findings_of(chain)) == ([2], 2, [])
    add_generation(chain, HISTORY[1][1], 2)
    squash(chain)
    assert (chain.generations(), noted(chain), findings_of(chain)) == ([3], 3, [])


# -- what the note may be ------------------------------------------------------------------------


def test_a_chain_of_an_older_version_has_none(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "old")
    chain = Chain.open(tmp_path / "old")
    assert (noted(chain), findings_of(chain), chain.require(None)) == (None, [], 2)
    add_generation(chain, {"mm-1": [data(0, soft_page(1))]})
    assert (noted(chain), findings_of(chain)) == (3, [])


def test_a_note_that_lags_behind_is_put_right_by_the_next(chain):
    (chain.path / "newest").write_bytes(encode_newest(chain.chain_id, 0))
    assert (findings_of(chain), chain.require(None), chain.next_number()) == ([], 2, 3)
    add_generation(chain, HISTORY[1][1], 0)
    assert noted(chain) == 3


def be_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def be_directory(path):
    path.unlink()
    path.mkdir()


WHOLE = encode_newest(CHAIN_ID, 2)
DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "too long": lambda path: path.write_bytes(bytes(MAX_NEWEST_BYTES + 1)),
    "another number": lambda path: path.write_bytes(path.read_bytes().replace(b"0002", b"0001")),
    "another chain": lambda path: path.write_bytes(encode_newest(CHAIN_ID, 2)),
    "link": be_link,
    "directory": be_directory,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_note_is_told_and_hides_no_generation(chain, damage):
    DAMAGES[damage](chain.path / "newest")
    assert [one.split(":")[0] for one in findings_of(chain)] == ["newest generation"]
    kind = ChainBroken if damage == "another chain" else ImageCorrupt
    with pytest.raises(kind) as caught:
        chain.require(None)
    assert caught.value.path == str(chain.path / "newest")
    assert_reads(chain, chain.require(2))
    writer_could = damage != "directory"
    assert add_generation(chain, HISTORY[1][1], 0).generation == 3
    assert (findings_of(chain) == []) == writer_could


def test_no_bit_of_the_note_may_be_another():
    assert decode_newest(WHOLE, "newest") == (CHAIN_ID, 2)
    for at in range(len(WHOLE) * 8):
        content = bytearray(WHOLE)
        content[at // 8] ^= 1 << at % 8
        with pytest.raises(ImageCorrupt):
            decode_newest(bytes(content), "newest")


def test_who_restores_does_not_take_the_word_of_another(chain):
    (chain.path / "newest").chmod(0o666)
    with pytest.raises(ImageUntrusted):
        Chain.open(chain.path, Access()).require(None)


def test_who_reads_while_another_writes_misses_nothing(chain):
    """The note may be newer than what was seen before: so what is there is listed behind it."""

    class Overtaken(NoSyncStore):
        def read_file(self, *parts, max_bytes):
            if parts == ("newest",):
                add_generation(make_again(), HISTORY[1][1], 0)
            return super().read_file(*parts, max_bytes=max_bytes)

    def make_again():
        return Chain.open(chain.path, make_store=NoSyncStore)

    assert Chain.open(chain.path, make_store=Overtaken).require(None) == 3


# -- a kill or a power cut -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PowerCutStore, DisorderStore])
def test_after_a_power_cut_at_any_step_nothing_is_missed_that_never_was(tmp_path, promise, kind):
    kept = promise("a power cut at any step of a writer leaves the old chain or the new one")

    def add(chain):
        add_generation(chain, HISTORY[2][1], 0)

    counted = Chain.open(make(tmp_path / "counted", 2).path, make_store=kind)
    add(counted)
    seen = set()
    for stop_at in range(counted.store.n_steps):
        kept.try_once()
        path = make(tmp_path / f"cut-{stop_at}", 2).path
        stopped = Chain.open(path, make_store=kind)
        stopped.store.stop_at = stop_at
        assert run_in_child(lambda stopped=stopped: add(stopped)) == 9
        after = Chain.open(path, make_store=NoSyncStore)
        assert findings_of(after) == []
        present = after.require(None)
        seen.add((present, noted(after)))
        for number in range(present + 1):
            assert_reads(after, number)
        add(after)
        assert (noted(after), findings_of(after)) == (present + 1, [])
    assert {(1, 1), (2, 1)} <= seen <= {(1, 1), (2, 1), (2, 2)}


# -- copies --------------------------------------------------------------------------------------


def test_a_copy_of_what_is_not_whole_is_refused_but_by_number(chain, tmp_path):
    lose(chain, 2)
    bucket = Bucket()
    for copy in (
        lambda number=None: fetch(chain, tmp_path / "back", number),
        lambda number=None: send(chain, bucket, number),
    ):
        with pytest.raises(ChainBroken, match="--at 1"):
            copy()
        assert copy(1).copied == (0, 1)
    assert not (set(os.listdir(tmp_path)) - {"chain", "back"})
    assert (noted(Chain.open(tmp_path / "back")), noted(bucket.chain())) == (1, 1)


def test_a_copy_brings_back_what_was_lost(chain, tmp_path):
    bucket = Bucket()
    send(chain, bucket)
    lose(chain, 1, 2)
    assert fetch(bucket.chain(), chain.path).copied == (1, 2)
    assert findings_of(chain) == []
    fetch(chain, tmp_path / "back")
    lose(Chain.open(tmp_path / "back"), 2)
    assert fetch(chain, tmp_path / "back", 1).copied == ()
    assert noted(Chain.open(tmp_path / "back")) == 2, "what is missed is still"


def test_in_object_storage_it_is_missed_too(chain):
    bucket = Bucket()
    send(chain, bucket)
    assert bucket.written[-1][0] == "newest"
    for name in ("manifest", "pages-0"):
        bucket.memory.rm_file(f"/bucket/job/gen-000002/{name}")
    gone = bucket.chain()
    assert "gen-000002/manifest: it was the newest generation, and is gone" in findings_of(gone)[0]
    with pytest.raises(ChainBroken, match="--at 1"):
        gone.require(None)
    assert send(chain, bucket).copied == (2,)
    assert findings_of(bucket.chain()) == []


def test_a_damaged_note_in_object_storage_is_written_anew(chain):
    bucket = Bucket()
    send(chain, bucket)
    Objects.put(bucket, "newest", b"nothing")
    with pytest.raises(ImageCorrupt):
        bucket.chain().require(None)
    assert send(chain, bucket).copied == ()
    assert (noted(bucket.chain()), findings_of(bucket.chain())) == (2, [])


def test_an_older_copy_does_not_take_the_note_back(chain, tmp_path):
    bucket = Bucket()
    send(chain, bucket)
    shutil.copytree(chain.path, tmp_path / "older")
    older = lose(Chain.open(tmp_path / "older"), 2)
    (older.path / "newest").unlink()
    again = Bucket(bucket.memory)
    send(older, again)
    assert (noted(bucket.chain()), again.written) == (2, [])


def test_who_reads_object_storage_while_another_sends_misses_nothing(chain):
    bucket = Bucket()
    send(chain, bucket)
    reading = open_remote(Bucket(bucket.memory))
    add_generation(chain, HISTORY[1][1], 0)
    send(chain, bucket)
    assert reading.generations() == [0, 1, 2], "as it was listed"
    assert require_newest(reading.store, reading.chain_id) == 3


def test_what_arrives_by_migration_is_noted(chain, tmp_path):
    other = new_chain(tmp_path / "arrived")
    with other.lock():
        arrive(chain, other)
    assert (noted(other), findings_of(other)) == (0, [])
    assert "there is no other" in findings_of(lose(other, 0))[0]
