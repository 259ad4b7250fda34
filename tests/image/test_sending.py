"""The promise: whatever stops a copy into object storage, a chain is there, and it can go on.

Each request is the last one in turn; then the same command sends what is missing and nothing else.
"""

import shutil

import pytest

from ckpt.errors import ChainBroken, ImageBusy, ImageCorrupt, ImageUnusable
from ckpt.image.chain import Chain
from ckpt.image.objects import Objects
from ckpt.image.reader import PageReader
from ckpt.image.sending import send
from ckpt.image.squash import squash
from ckpt.image.verify import verify
from tests.image.bucket import (
    ALL,
    Bucket,
    Stopped,
    assert_replays,
    files_of,
    flipped,
    make_original,
    new_memory,
)
from tests.image.chain_model import (
    KEY,
    add_generation,
    data,
    hard_page,
    new_chain,
    pages_by_frames,
    parent,
    replay,
)
from tests.plugins.tree import TOP

GOLDEN = TOP / "images" / "golden"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_original(tmp_path_factory.mktemp("sending") / "chain")


@pytest.fixture
def image(original, tmp_path):
    shutil.copytree(original, tmp_path / "image")
    return Chain.open(tmp_path / "image")


def iter_stopped(chain, before=None, *, tears=False):
    """Send it, with each request as the one that is not carried out any more."""
    before = before or {}

    def begin(stop_at):
        bucket = Bucket(new_memory(), stop_at, tears=tears)
        for key, content in before.items():
            Objects.put(bucket, key, content)
        return bucket

    counted = begin(None)
    send(chain, counted)
    assert counted.n_requests > 3 * len(counted.written)
    for stop_at in range(counted.n_requests):
        bucket = begin(stop_at)
        with pytest.raises(Stopped):
            send(chain, bucket)
        yield bucket


def test_all_of_it_arrives_and_then_there_is_nothing_to_do(image):
    bucket = Bucket()
    result = send(image, bucket)
    here = files_of(image.path)
    assert bucket.content() == here
    assert (result.copied, result.present) == ((0, 1, 2, 3, 4), ())
    assert result.copied_bytes == sum(map(len, here.values()))
    assert_replays(bucket.chain(), range(5))
    again = Bucket(bucket.memory)
    assert send(image, again).present == (0, 1, 2, 3, 4)
    assert again.written == []
    beside = {len(here["CKPT"]), len(here["newest"])}
    assert set(again.read_bytes.values()) == {32, *beside}, "digests, no manifest"


def test_only_what_is_new_is_sent(image):
    bucket = Bucket()
    send(image, bucket)
    add_generation(image, {"mm": [data(0, hard_page(5)), parent(1, 10)]}, 4)
    again = Bucket(bucket.memory)
    assert send(image, again).copied == (5,)
    assert [key for key, _ in again.written] == [
        "gen-000005/pages-0",
        "gen-000005/manifest",
        "newest",
    ]


def test_the_lineage_of_one_generation(image):
    add_generation(image, {"mm": [data(0, hard_page(5))]})
    bucket = Bucket()
    assert send(image, bucket, 2).copied == (0, 1, 2)
    assert send(image, bucket, 5).copied == (5,)
    assert verify(bucket.chain()) == []
    assert send(image, bucket).copied == (3, 4)


@pytest.mark.parametrize("tears", [False, True])
def test_stopped_at_any_request_it_goes_on(image, tears):
    here = files_of(image.path)
    seen = set()
    for bucket in iter_stopped(image, tears=tears):
        there = bucket.content()
        numbers = []
        if "CKPT" in there:
            chain = bucket.chain()
            numbers = chain.generations()
            assert_replays(chain, range(len(numbers)))
        seen.add(len(numbers))
        whole = {key: content for key, content in there.items() if here[key] == content}
        assert tears or whole == there
        again = Bucket(bucket.memory)
        result = send(image, again)
        assert again.content() == here
        assert sorted(again.written) == sorted(
            (key, len(content)) for key, content in here.items() if key not in whole
        )
        kept = {key for key in whole if "pages" in key and int(key[4:10]) not in numbers}
        assert result.kept_bytes == sum(len(whole[key]) for key in kept)
    assert seen == {0, 1, 2, 3, 4, 5}


def test_a_merged_generation_takes_the_place_of_the_old_one_at_any_stop(image):
    bucket = Bucket()
    send(image, bucket)
    before = bucket.content()
    squash(image, 3)
    add_generation(image, {"mm": [parent(0, 11)]}, 3)
    merged = files_of(image.path)
    for stopped in iter_stopped(image, before):
        chain = stopped.chain()
        numbers = chain.generations()
        assert numbers[:5] == [0, 1, 2, 3, 4], "nothing is removed there"
        assert verify(chain) == []
        for number in numbers[:5]:
            assert pages_by_frames(PageReader(chain, number), "mm") == replay(ALL, number)["mm"]
        assert send(image, stopped.__class__(stopped.memory)).copied in {(5,), ()}
        assert merged.items() <= stopped.content().items()
        assert verify(stopped.chain()) == []


def test_what_was_merged_there_by_another_copy_is_left(image, tmp_path):
    bucket = Bucket()
    shutil.copytree(image.path, tmp_path / "merged")
    merged = Chain.open(tmp_path / "merged")
    squash(merged, 4)
    send(merged, bucket)
    before = bucket.content()
    assert send(image, bucket).present == (4,)
    assert before.items() <= bucket.content().items()
    assert_replays(bucket.chain(), range(5))


def test_another_chain_is_refused(image, tmp_path):
    bucket = Bucket()
    other = new_chain(tmp_path / "other")
    add_generation(other, {"mm": [data(0, hard_page(1))]})
    send(other, bucket)
    before = bucket.content()
    with pytest.raises(ChainBroken, match="it holds chain") as refused:
        send(image, bucket)
    assert refused.value.exit_code == 33
    assert bucket.content() == before


def test_a_chain_that_has_gone_its_own_way_is_refused_before_anything_is_sent(image, tmp_path):
    shutil.copytree(image.path, tmp_path / "twin")
    twin = Chain.open(tmp_path / "twin")
    for chain, seed in ((twin, 5), (image, 6)):
        add_generation(chain, {"mm": [data(0, hard_page(seed)), parent(1, 10)]}, 4)
    bucket = Bucket()
    send(twin, bucket)
    Objects.list(bucket)
    bucket.memory.rm("/bucket/job/gen-000002/manifest")
    before = bucket.content()
    with pytest.raises(ChainBroken, match="another generation 5"):
        send(image, bucket)
    assert bucket.content() == before


def test_it_is_not_put_among_other_things(image):
    bucket = Bucket()
    Objects.put(bucket, "holiday.jpg", b"a beach")
    with pytest.raises(ImageUnusable, match="not empty"):
        send(image, bucket)
    assert bucket.content() == {"holiday.jpg": b"a beach"}


@pytest.mark.parametrize("key", ["gen-000000/pages-0", "gen-000001/manifest"])
def test_what_is_lost_there_is_sent_again(image, key):
    bucket = Bucket()
    send(image, bucket)
    bucket.memory.rm(f"/bucket/job/{key}")
    send(image, bucket)
    assert bucket.content() == files_of(image.path)


def test_damage_there_is_found(image):
    bucket = Bucket()
    send(image, bucket)
    for key in ("gen-000000/pages-1", "gen-000002/manifest"):
        bucket.alter(key, flipped)
        assert verify(bucket.chain()) != []
        bucket.alter(key, flipped)
    assert verify(bucket.chain()) == []


def test_damage_here_is_not_sent(image):
    pages = image.path / "gen-000001" / "pages-0"
    pages.write_bytes(flipped(pages.read_bytes()))
    bucket = Bucket()
    with pytest.raises(ImageCorrupt, match="pages-0 is damaged"):
        send(image, bucket)
    assert bucket.chain().generations() == [0]
    assert "gen-000001/pages-0" not in bucket.content()


class Altering(Bucket):
    """Stores something else than it is given, or has another writer beside us."""

    def __init__(self, key, how, *, harms=True):
        super().__init__()
        self.key = key
        self.how = how
        self.harms = harms

    def send(self, key, path, report):
        super().send(key, path, report)
        if key == self.key and self.how == "damages":
            self.alter(key, flipped)

    def create(self, key, data):
        if key == self.key and self.how == "precedes":
            Objects.create(self, key, flipped(data) if self.harms else data)
        created = super().create(key, data)
        if key == self.key and self.how == "damages":
            self.alter(key, flipped)
        if self.how == "follows" and key == "gen-000001/manifest":
            self.alter(self.key, flipped if self.harms else lambda content: content)
        return created


@pytest.mark.parametrize(
    ("key", "how", "error"),
    [
        ("CKPT", "damages", ImageCorrupt),
        ("gen-000001/pages-0", "damages", ImageCorrupt),
        ("gen-000001/manifest", "damages", ImageCorrupt),
        ("gen-000001/pages-0", "follows", ImageCorrupt),
        ("gen-000001/manifest", "precedes", ImageBusy),
        ("CKPT", "precedes", ImageBusy),
    ],
)
def test_what_does_not_arrive_as_it_was_sent_is_told(image, key, how, error):
    with pytest.raises(error):
        send(image, Altering(key, how))


@pytest.mark.parametrize(
    ("key", "how"),
    [("CKPT", "precedes"), ("gen-000001/manifest", "precedes"), ("gen-000001/pages-0", "follows")],
)
def test_another_copy_of_the_same_chain_does_no_harm(image, key, how):
    bucket = Altering(key, how, harms=False)
    send(image, bucket)
    assert bucket.content() == files_of(image.path)


def test_an_encrypted_chain_is_sent_as_it_is(tmp_path):
    path = tmp_path / "sealed"
    shutil.copytree(GOLDEN / "format-2.0", path)
    bucket = Bucket()
    send(Chain.open(path), bucket)
    there = bucket.content()
    assert b"generation 000002" in there.pop("newest"), "older versions have none"
    assert there == files_of(path)
    chain = bucket.chain()
    assert chain.recipients == (KEY.recipient,)
    assert verify(chain) == []
