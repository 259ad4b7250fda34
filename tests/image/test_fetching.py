"""The promise: what is fetched is checked before it counts, and goes on wherever it was stopped."""

import contextlib
import os
import shutil
import stat

import attrs
import pytest

from ckpt.errors import ChainBroken, HostFull, ImageBusy, ImageCorrupt, ImageUnusable, NoGeneration
from ckpt.image.chain import Chain
from ckpt.image.fetching import PART_PREFIX, fetch
from ckpt.image.format import encode_manifest
from ckpt.image.objects import Objects, Stored
from ckpt.image.reader import PageReader
from ckpt.image.remote import open_remote
from ckpt.image.sending import send
from ckpt.image.squash import squash
from ckpt.image.store import Store
from ckpt.image.verify import verify
from tests.image.bucket import (
    ALL,
    Bucket,
    Stopped,
    assert_replays,
    files_of,
    flipped,
    make_original,
)
from tests.image.chain_model import (
    add_generation,
    data,
    hard_page,
    new_chain,
    pages_by_frames,
    parent,
    replay,
)
from tests.plugins.tree import TOP

STEPS = ("make_root", "make_directory", "create_file", "append", "sync_file", "close_file")
STEPS += ("sync_directory", "rename", "write_file", "remove_file", "remove_temporary")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_original(tmp_path_factory.mktemp("fetching") / "chain")


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    """Do not wait for the disk: none of this is about power cuts."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def image(original, tmp_path):
    shutil.copytree(original, tmp_path / "image")
    return Chain.open(tmp_path / "image")


@pytest.fixture
def bucket(image):
    filled = Bucket()
    send(image, filled)
    return Bucket(filled.memory)


def assert_fetched(path, image):
    assert files_of(path) == files_of(image.path)
    assert_replays(Chain.open(path), range(5))


def parts_of(path):
    """Return the page files of a generation that has not come whole, by what they are there."""
    found = path.glob(f"{PART_PREFIX}*/pages-*") if path.exists() else ()
    return {str(file.relative_to(path))[len(PART_PREFIX) :]: file.read_bytes() for file in found}


def test_all_of_it_comes_and_then_there_is_nothing_to_do(bucket, image, tmp_path):
    result = fetch(bucket.chain(), tmp_path / "back")
    assert_fetched(tmp_path / "back", image)
    assert result.copied == (0, 1, 2, 3, 4)
    again = Bucket(bucket.memory)
    result = fetch(open_remote(again), tmp_path / "back")
    assert (result.copied, result.present) == ((), (0, 1, 2, 3, 4))
    assert not any("pages" in key for key in again.read_bytes)


def test_only_what_is_new_comes(bucket, image, tmp_path):
    fetch(bucket.chain(), tmp_path / "back")
    add_generation(image, {"mm": [data(0, hard_page(5)), parent(1, 10)]}, 4)
    send(image, bucket)
    again = Bucket(bucket.memory)
    assert fetch(open_remote(again), tmp_path / "back").copied == (5,)
    assert [key for key in again.read_bytes if "pages" in key] == ["gen-000005/pages-0"]
    assert files_of(tmp_path / "back") == files_of(image.path)


def test_a_lineage_comes_alone_and_the_chain_goes_on_from_it(bucket, image, tmp_path):
    add_generation(image, {"mm": [data(0, hard_page(5))]})
    send(image, bucket)
    back = tmp_path / "back"
    assert fetch(bucket.chain(), back, 5).copied == (5,)
    assert fetch(bucket.chain(), back, 2).copied == (0, 1, 2)
    assert Chain.open(back).generations() == [0, 1, 2, 5]
    add_generation(Chain.open(back), {"mm": [data(0, hard_page(6))]}, 5)
    assert send(Chain.open(back), bucket).copied == (6,)
    with pytest.raises(NoGeneration):
        fetch(bucket.chain(), back, 9)


def test_from_directory_to_directory(image, tmp_path):
    assert fetch(image, tmp_path / "back").copied == (0, 1, 2, 3, 4)
    assert_fetched(tmp_path / "back", image)


def test_what_is_fetched_is_private(bucket, tmp_path):
    before = os.umask(0)
    try:
        fetch(bucket.chain(), tmp_path / "back")
    finally:
        os.umask(before)
    for path in (tmp_path / "back", *(tmp_path / "back").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def assert_goes_on(bucket, image, back):
    """Hold that a shorter chain is there, and that the rest comes and nothing else.

    Returns how many generations were there, and whether page files of one more were.
    """
    numbers = []
    if (back / "CKPT").exists():
        numbers = Chain.open(back).generations()
        assert_replays(Chain.open(back), range(len(numbers)))
    here = files_of(image.path)
    parts = {key for key, content in parts_of(back).items() if here[key] == content}
    whole = parts | {key for key in here if (back / key).exists()}
    again = Bucket(bucket.memory)
    fetch(open_remote(again), back)
    assert_fetched(back, image)
    assert not list(back.glob(".*"))
    come = {key: n for key, n in again.read_bytes.items() if "pages" in key}
    assert come == {key: len(here[key]) for key in here if "pages" in key and key not in whole}
    return len(numbers), bool(parts)


def test_stopped_at_any_request_it_goes_on(bucket, image, tmp_path):
    counted = Bucket(bucket.memory)
    fetch(open_remote(counted), tmp_path / "counted")
    seen = set()
    for stop_at in range(counted.n_requests):
        back = tmp_path / f"stopped-{stop_at}"
        with pytest.raises(Stopped):
            fetch(open_remote(Bucket(bucket.memory, stop_at)), back)
        seen.add(assert_goes_on(bucket, image, back))
    assert seen >= {(number, False) for number in range(5)} | {(0, True)}


@contextlib.contextmanager
def steps(monkeypatch, stop_at, error):
    """Count the steps on the disk; at number `stop_at`, and from there on, `error` is raised."""
    counted = []

    def wrap(name):
        real = getattr(Store, name)

        def step(*args, **more):
            counted.append(name)
            if stop_at is not None and len(counted) > stop_at:
                raise error
            return real(*args, **more)

        return step

    with monkeypatch.context() as patched:
        for name in STEPS:
            patched.setattr(Store, name, wrap(name))
        yield counted


@pytest.mark.parametrize("error", [Stopped(), HostFull("no room", "this is a test")])
def test_stopped_at_any_step_on_the_disk_it_goes_on(bucket, image, tmp_path, monkeypatch, error):
    with steps(monkeypatch, None, None) as counted:
        fetch(bucket.chain(), tmp_path / "counted")
    seen = set()
    for stop_at in range(len(counted)):
        back = tmp_path / f"stopped-{stop_at}"
        with steps(monkeypatch, stop_at, error), pytest.raises(type(error)):
            fetch(bucket.chain(), back)
        seen.add(assert_goes_on(bucket, image, back))
    assert seen >= {(number, False) for number in range(6)} | {(n, True) for n in range(4)}


def test_what_is_left_of_a_generation_that_nobody_wants_is_removed(bucket, tmp_path):
    back = tmp_path / "back"
    fetch(bucket.chain(), back, 1)
    left = back / f"{PART_PREFIX}gen-000003"
    left.mkdir()
    (left / "pages-0").write_bytes(b"secret")
    fetch(bucket.chain(), back, 2)
    assert not left.exists()


@pytest.mark.parametrize("key", ["gen-000000/pages-1", "gen-000002/pages-0", "gen-000002/manifest"])
def test_damage_there_is_found_before_it_counts(bucket, tmp_path, key):
    bucket.alter(key, flipped)
    with pytest.raises(ImageCorrupt) as found:
        fetch(bucket.chain(), tmp_path / "back")
    assert found.value.path == f"s3://bucket/job/{key}"
    back = Chain.open(tmp_path / "back")
    numbers = back.generations()
    assert_replays(back, range(len(numbers)))
    assert len(numbers) <= int(key[4:10])


def test_names_that_a_chain_does_not_have_are_not_used(bucket, image, tmp_path):
    odd = ["../CKPT", "gen-000000/../../passwd", "gen-0000007/manifest", "gen-000000/pages-01"]
    odd += [
        "gen-000009/pages-0",
        "gen-00000\u0661/manifest",
        "/etc/passwd",
        "gen-000000/x/manifest",
    ]
    for key in odd:
        bucket.memory.store[f"/bucket/job/{key}"] = bucket.memory.open("/junk", "wb")
    fetch(bucket.chain(), tmp_path / "back")
    assert_fetched(tmp_path / "back", image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "image"]


class Lying(Objects):
    """Says that things are of another size than they are, and gives no more than was asked for."""

    def __init__(self, bucket, key, size_bytes):
        super().__init__(bucket.memory, "/bucket/job", bucket.url)
        self.key = key
        self.size_bytes = size_bytes

    def list(self, key=""):
        listed = super().list(key)
        return listed | {self.key: Stored(self.size_bytes, "")}

    def read(self, key, start, end):
        assert end - start <= 256 << 20, "nobody asks for more than a manifest may have"
        return super().read(key, start, end)


@pytest.mark.parametrize(
    ("key", "size_bytes"),
    [
        ("CKPT", 1 << 60),
        ("CKPT", 90),
        ("gen-000000/manifest", 1 << 60),
        ("gen-000000/manifest", 0),
        ("gen-000000/manifest", 1 << 20),
        ("gen-000000/pages-0", 1 << 60),
        ("gen-000000/pages-0", 1),
    ],
)
def test_a_store_that_lies_is_found_out(bucket, tmp_path, key, size_bytes):
    with pytest.raises(ImageCorrupt):
        fetch(open_remote(Lying(bucket, key, size_bytes)), tmp_path / "back")
    back = tmp_path / "back"
    assert not back.exists() or Chain.open(back).generations() == []


def test_another_chain_is_refused(bucket, tmp_path):
    other = new_chain(tmp_path / "other")
    add_generation(other, {"mm": [data(0, hard_page(1))]})
    before = files_of(other.path)
    with pytest.raises(ChainBroken, match="it holds chain") as refused:
        fetch(bucket.chain(), other.path)
    assert refused.value.exit_code == 33
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "beach.jpg").touch()
    with pytest.raises(ImageUnusable, match="not empty"):
        fetch(bucket.chain(), tmp_path / "photos")
    assert files_of(other.path) == before


def test_a_generation_that_is_another_here_is_refused_before_anything_comes(bucket, tmp_path):
    fetch(bucket.chain(), tmp_path / "back", 3)
    add_generation(Chain.open(tmp_path / "back"), {"mm": [data(0, hard_page(8))]})
    before = files_of(tmp_path / "back")
    with pytest.raises(ChainBroken, match="another generation 4"):
        fetch(bucket.chain(), tmp_path / "back")
    assert files_of(tmp_path / "back") == before


def test_what_was_merged_here_stays(bucket, tmp_path):
    back = tmp_path / "back"
    fetch(bucket.chain(), back, 3)
    squash(Chain.open(back), 3)
    assert fetch(bucket.chain(), back).copied == (0, 1, 2, 4)
    assert_replays(Chain.open(back), range(5))


def test_what_was_merged_there_takes_the_place_of_the_old_one_at_any_stop(
    bucket, image, tmp_path, monkeypatch
):
    old = tmp_path / "old"
    fetch(bucket.chain(), old)
    squash(image, 3)
    add_generation(image, {"mm": [parent(0, 11)]}, 3)
    send(image, bucket)
    with Chain.open(old).in_use(), pytest.raises(ImageBusy):
        fetch(bucket.chain(), old)
    back = tmp_path / "counted"
    shutil.copytree(old, back)
    with steps(monkeypatch, None, None) as counted:
        result = fetch(bucket.chain(), back)
    assert (result.replaced, result.copied) == ((3,), (5,))
    assert files_of(image.path).items() <= files_of(back).items()
    seen = set()
    for stop_at in range(len(counted)):
        back = tmp_path / f"stopped-{stop_at}"
        shutil.copytree(old, back)
        with steps(monkeypatch, stop_at, Stopped()), pytest.raises(Stopped):
            fetch(bucket.chain(), back)
        chain = Chain.open(back)
        seen.add((chain.manifest(3).kind, 5 in chain.generations()))
        assert verify(chain) == []
        for number in range(5):
            assert pages_by_frames(PageReader(chain, number), "mm") == replay(ALL, number)["mm"]
        fetch(bucket.chain(), back)
        assert files_of(image.path).items() <= files_of(back).items()
        assert verify(Chain.open(back)) == []
        assert not list(back.glob(".*"))
    assert seen == {("delta", False), ("full", False), ("full", True)}


def test_a_delta_on_what_is_another_there_is_found(bucket, image, tmp_path):
    manifest = image.manifest(4)
    wrong = attrs.evolve(manifest, parent=attrs.evolve(manifest.parent, digest=bytes(32)))
    Objects.put(bucket, "gen-000004/manifest", encode_manifest(wrong)[0])
    with pytest.raises(ChainBroken, match="is not the generation 3"):
        fetch(bucket.chain(), tmp_path / "back")
    assert_replays(Chain.open(tmp_path / "back"), range(4))


def test_one_writer_at_a_time(bucket, tmp_path):
    back = tmp_path / "back"
    fetch(bucket.chain(), back, 1)
    with Chain.open(back).lock(), pytest.raises(ImageBusy):
        fetch(bucket.chain(), back)


def test_an_encrypted_chain_comes_without_its_key(tmp_path):
    sealed = Chain.open(TOP / "images" / "golden" / "format-2.0")
    bucket = Bucket()
    send(sealed, bucket)
    fetch(bucket.chain(), tmp_path / "back")
    back = files_of(tmp_path / "back")
    assert b"generation 000002" in back.pop("newest"), "older versions have none"
    assert back == files_of(sealed.path)
    assert verify(Chain.open(tmp_path / "back")) == []
