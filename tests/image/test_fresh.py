"""The promise: a chain that was made for a generation that never came is not left lying about."""

import pytest

from ckpt.errors import HostFull
from ckpt.image.chain import Chain
from tests.image.chain_model import NoSyncStore, add_generation, data, new_chain, soft_page

FULL = HostFull("no room", "make some")


def fail_in(chain, error=FULL):
    with chain.lock():
        raise error


def test_directory_and_header_are_removed(tmp_path):
    chain = new_chain(tmp_path / "chain")
    with pytest.raises(HostFull):
        fail_in(chain)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_there_stays(tmp_path):
    (tmp_path / "chain").mkdir()
    with pytest.raises(HostFull):
        fail_in(new_chain(tmp_path / "chain"))
    assert list((tmp_path / "chain").iterdir()) == []


def test_a_chain_that_was_there_stays(tmp_path):
    new_chain(tmp_path / "chain")
    with pytest.raises(HostFull):
        fail_in(new_chain(tmp_path / "chain"))
    assert Chain.open(tmp_path / "chain").generations() == []


def test_a_chain_with_a_generation_stays(tmp_path):
    chain = new_chain(tmp_path / "chain")
    add_generation(chain, {"mm": [data(0, soft_page(1))]})
    with pytest.raises(HostFull):
        fail_in(chain)
    assert Chain.open(tmp_path / "chain").generations() == [0]


def test_a_bug_of_ours_removes_nothing(tmp_path):
    """Who knows what state it is in."""
    with pytest.raises(ZeroDivisionError):
        fail_in(new_chain(tmp_path / "chain"), ZeroDivisionError())
    assert Chain.open(tmp_path / "chain").generations() == []


@pytest.mark.parametrize("step", ["create_file", "append", "sync_file", "rename"])
def test_no_room_for_the_header(tmp_path, step):
    class Full(NoSyncStore):
        def __getattribute__(self, name):
            if name == step:
                raise FULL
            return super().__getattribute__(name)

    with pytest.raises(HostFull):
        new_chain(tmp_path / "chain", Full)
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_else_put_there_meanwhile_stays(tmp_path):
    chain = new_chain(tmp_path / "chain")
    (tmp_path / "chain" / "letter").write_text("dear")
    with pytest.raises(HostFull):
        fail_in(chain)
    assert [path.name for path in (tmp_path / "chain").iterdir()] == ["letter"]
