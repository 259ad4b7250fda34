"""Opening, making, locking and walking a chain, and what a user is told when it cannot be done."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from ckpt.errors import (
    ChainBroken,
    ImageBusy,
    ImageCorrupt,
    ImageUnusable,
    NoGeneration,
)
from ckpt.image.chain import Chain
from ckpt.image.format import Fate, Kind
from ckpt.image.runs import RunTableBuilder
from tests.image.chain_model import (
    PAGE,
    NoSyncStore,
    add_generation,
    data,
    new_chain,
    parent,
    soft_page,
    zero,
)
from tests.image.test_crash import run_in_child

ONE = {"mm": [data(0, soft_page(1)), zero(1, 1)]}
SAME = {"mm": [parent(0, 2)]}


@pytest.fixture
def chain(tmp_path):
    return new_chain(tmp_path / "chain")


def test_a_new_chain_is_private_and_empty(chain):
    assert chain.generations() == []
    assert chain.newest() is None
    assert len(chain.chain_id) == 32
    assert Chain.open(chain.path).chain_id == chain.chain_id
    assert Chain.create_or_open(chain.path).chain_id == chain.chain_id
    assert (chain.path / "CKPT").read_text() == f"ckpt image 1.0\nchain {chain.chain_id}\n"


def test_modes_keep_others_out_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        chain = new_chain(tmp_path / "chain")
        add_generation(chain, ONE)
    finally:
        os.umask(old)
    modes = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode)
        for path in (chain.path, *chain.path.rglob("*"))
    }
    assert modes == {
        "chain": 0o700,
        "chain/CKPT": 0o600,
        "chain/lock": 0o600,
        "chain/newest": 0o600,
        "chain/gen-000000": 0o700,
        "chain/gen-000000/manifest": 0o600,
        "chain/gen-000000/pages-0": 0o600,
    }


def test_chains_have_different_ids(tmp_path):
    assert new_chain(tmp_path / "a").chain_id != new_chain(tmp_path / "b").chain_id


@pytest.mark.parametrize("way_in", [Chain.open, Chain.create_or_open])
def test_a_file_is_not_an_image(tmp_path, way_in):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ImageUnusable, match="this is a file"):
        way_in(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("way_in", [Chain.open, Chain.create_or_open])
def test_a_directory_of_somebody_else_is_left_alone(tmp_path, way_in):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ImageUnusable, match="not an image directory"):
        way_in(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes"]


def test_an_empty_directory_becomes_a_chain(tmp_path):
    assert Chain.create_or_open(tmp_path).path == tmp_path


def test_a_missing_directory_is_not_made_by_reading(tmp_path):
    with pytest.raises(ImageUnusable, match="no such directory"):
        Chain.open(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(ImageUnusable, match="missing does not exist: make it first"):
        Chain.create_or_open(tmp_path / "missing" / "chain")


def test_a_place_where_nothing_can_be_made_is_told():
    with pytest.raises(ImageUnusable, match="cannot make it"):
        Chain.create_or_open("/proc/ckpt-chain")


def without_privilege(job):
    """Return what `job` raised, as text, run by somebody who is not root."""
    reading, writing = os.pipe()

    def drop_and_run():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setuid(65534)
        try:
            job()
        except ImageUnusable as error:
            os.write(writing, str(error).encode())

    run_in_child(drop_and_run)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read()


@pytest.fixture
def readable():
    """A chain that everybody may read and only its owner write."""
    path = Path(tempfile.mkdtemp())
    chain = new_chain(path / "chain")
    for directory in (path, chain.path):
        directory.chmod(0o555)
    (chain.path / "CKPT").chmod(0o444)
    yield chain
    for directory in (path, chain.path):
        directory.chmod(0o700)
    shutil.rmtree(path)


def test_a_chain_that_cannot_be_written_is_told_before_any_work(readable):
    text = without_privilege(lambda: Chain.create_or_open(readable.path))
    assert text == f"{readable.path}: it is not writable for you, or read-only"
    assert without_privilege(lambda: Chain.open(readable.path)) == ""


def test_a_chain_that_cannot_be_read_is_told(readable):
    readable.path.chmod(0o700)
    readable.path.parent.chmod(0o700)
    if os.geteuid() != 0:
        readable.path.chmod(0)
    assert "Permission denied" in without_privilege(lambda: Chain.open(readable.path))


def test_one_writer_at_a_time(chain):
    other = Chain.open(chain.path)
    with chain.lock():
        with pytest.raises(ImageBusy, match="in use by another ckpt"), other.lock():
            pass
        assert other.generations() == []
    with other.lock():
        pass


def test_a_writer_that_dies_gives_the_lock_back(chain):
    def die_with_the_lock():
        with chain.lock():
            os._exit(5)

    assert run_in_child(die_with_the_lock) == 5
    with chain.lock():
        pass


def test_a_child_that_inherits_the_lock_does_not_keep_it(chain):
    reading, writing = os.pipe()
    with chain.lock():
        pid = os.fork()
        if pid == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        with Chain.open(chain.path).lock():
            pass
    finally:
        os.close(writing)
        os.waitpid(pid, 0)
        os.close(reading)


def test_left_over_temporaries_go_with_the_next_lock(chain):
    (chain.path / ".tmp-gen-000000").mkdir()
    (chain.path / ".tmp-gen-000000" / "pages-0").write_text("half")
    (chain.path / ".tmp-CKPT").write_text("half")
    assert chain.generations() == []
    with chain.lock():
        assert sorted(entry.name for entry in chain.path.iterdir()) == ["CKPT", "lock"]


def test_begin_needs_the_lock_and_one_writer(chain):
    with pytest.raises(RuntimeError):
        chain.begin(None)
    with chain.lock(), chain.begin(None), pytest.raises(RuntimeError):
        chain.begin(None)


def test_generations_form_a_tree_and_numbers_only_count_up(chain):
    add_generation(chain, ONE)
    first = add_generation(chain, SAME, 0)
    second = add_generation(chain, SAME, 0)
    full = add_generation(chain, ONE)
    assert (first.generation, second.generation, full.generation) == (1, 2, 3)
    assert (first.kind, full.kind) == (Kind.DELTA, Kind.FULL)
    assert second.parent == first.parent
    assert full.parent is None
    again = Chain.open(chain.path)
    assert [manifest.generation for manifest in again.lineage(2)] == [2, 0]
    assert again.newest() == 3


def test_a_number_that_is_gone_is_not_taken_again_while_higher_ones_are_there(chain):
    for _ in range(3):
        add_generation(chain, ONE)
    shutil.rmtree(chain.path / "gen-000001")
    assert add_generation(Chain.open(chain.path), ONE).generation == 3


def test_the_manifest_is_the_one_that_commit_returned(chain):
    written = add_generation(
        chain,
        ONE,
        records={"process": [{"pid": 7, "name": "bän", "blob": b"\0\xff"}]},
        host={"kernel": "6.1"},
        reason="because",
        freeze_ms=2.5,
        wall_ms=10,
        extra={"later": 1},
    )
    read = Chain.open(chain.path).manifest(0)
    assert read == written
    assert read.digest == written.digest
    assert len(read.digest) == 32
    assert read.stored_bytes == (chain.path / "gen-000000/pages-0").stat().st_size


@pytest.mark.parametrize(
    ("present", "text"),
    [
        ((), "it has none yet"),
        ((0,), "it has 0"),
        ((0, 1, 2), "it has 0 to 2"),
        ((0, 2), "it has 0, 2"),
    ],
)
def test_an_absent_generation_is_told_with_what_there_is(chain, present, text):
    for number in range(3):
        add_generation(chain, ONE)
        if number not in present:
            (chain.path / f"gen-{number:06d}").rename(chain.path / f"gone-{number}")
            # Keep the number taken for the next one.
            (chain.path / f"gen-{number:06d}").mkdir()
    for number in set(range(3)) - set(present):
        (chain.path / f"gen-{number:06d}").rmdir()
    with pytest.raises(NoGeneration, match=rf"no generation 7; {text}$"):
        Chain.open(chain.path).manifest(7)


def test_a_delta_on_something_that_is_not_there_is_refused(chain):
    add_generation(chain, ONE)
    with chain.lock(), pytest.raises(NoGeneration):
        chain.begin(5)


def test_a_delta_on_a_broken_lineage_is_refused(chain):
    add_generation(chain, ONE)
    add_generation(chain, SAME, 0)
    shutil.rmtree(chain.path / "gen-000000")
    again = Chain.open(chain.path)
    with again.lock(), pytest.raises(ChainBroken, match="gen-000000"):
        again.begin(1)


def test_a_delta_with_pages_of_another_size_is_refused(chain):
    add_generation(chain, ONE)
    with chain.lock(), pytest.raises(ImageUnusable, match="pages of 4096 bytes"):
        chain.begin(0, page_size=65536)


def test_a_run_that_the_parent_cannot_fill_is_a_bug_found_before_the_commit(chain):
    add_generation(chain, ONE)
    with pytest.raises(ValueError, match="said to be in generation 0"):
        add_generation(chain, {"mm": [parent(0, 3)]}, 0)
    with pytest.raises(ValueError, match="said to be in generation 0"):
        add_generation(chain, {"other": [parent(0, 1)]}, 0)
    assert chain.generations() == [0]


def test_a_wrong_run_table_is_a_bug_found_before_the_commit(chain):
    builder = RunTableBuilder(PAGE)
    builder.add(0, 2, Fate.DATA, 0)
    with chain.lock(), chain.begin(None, page_size=PAGE) as writer:
        writer.write_pages(soft_page(1))
        with pytest.raises(ValueError, match="page stream of 1"):
            writer.commit(spaces={"mm": builder.build()}, records={}, host={}, tracker="full")
    assert chain.generations() == []


@pytest.mark.parametrize("records", [{"fds": {3: "file"}}, {"many": [0] * ((1 << 20) + 1)}])
def test_records_that_could_not_be_read_back_are_a_bug_found_before_the_commit(chain, records):
    with pytest.raises(ValueError, match="not valid msgpack"):
        add_generation(chain, ONE, records=records)
    assert chain.generations() == []


def test_resolving_an_unknown_space_names_the_manifest(chain):
    add_generation(chain, ONE)
    with pytest.raises(ImageCorrupt, match=r"gen-000000/manifest .* no page space named 'mm-9'"):
        chain.resolve(0, "mm-9")


def test_a_space_that_was_gone_in_between_hides_what_was_before(chain):
    add_generation(chain, ONE)
    add_generation(chain, {}, 0)
    with pytest.raises(ValueError, match="said to be in generation 1"):
        add_generation(chain, SAME, 1)
    add_generation(chain, ONE, 1)
    assert [run.generation for run in chain.resolve(2, "mm")] == [2, 2]


def test_many_generations_resolve_without_recursion(chain):
    add_generation(chain, ONE)
    for number in range(60):
        add_generation(chain, SAME, number)
    runs = Chain.open(chain.path, make_store=NoSyncStore).resolve(60, "mm")
    assert [(run.fate, run.generation) for run in runs] == [(Fate.DATA, 0), (Fate.ZERO, 0)]
