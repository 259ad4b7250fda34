"""A generation that is checked by a child and by us, whoever is quicker."""

import os
import signal

import pytest

from ckpt.errors import ImageCorrupt
from ckpt.image import ahead
from ckpt.image.ahead import Ahead
from ckpt.image.chain import Chain
from tests.image.chain_model import add_generation, data, hard_page, new_chain

N = 40


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Forty frames of a page each, and a child for however little there is."""
    monkeypatch.setattr(ahead, "_WORTH_BYTES", 0)
    monkeypatch.setattr(ahead, "_MOST_TICKETS", 7)
    made = new_chain(tmp_path / "chain")
    pages = [data(2 * n, hard_page(n)) for n in range(N)]
    add_generation(made, {"mm": pages}, after_run=lambda writer: writer.flush())
    return Chain.open(made.path)


def has_children():
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def test_a_good_generation_passes(chain):
    with Ahead(chain, 0) as checking:
        assert checking.finish() is checking.reader
    assert not has_children()


@pytest.mark.parametrize("frame", [0, N // 2, N - 1])
def test_damage_is_found_whoever_sees_it(chain, frame):
    path = chain.path / "gen-000000" / "pages-0"
    content = bytearray(path.read_bytes())
    content[frame * len(content) // N + 9] ^= 1
    path.write_bytes(content)
    with Ahead(chain, 0) as checking, pytest.raises(ImageCorrupt, match=f"frame {frame} "):
        checking.finish()
    assert not has_children()


def test_what_a_killed_child_has_taken_is_checked_again(chain):
    with Ahead(chain, 0) as checking:
        os.kill(checking._child, signal.SIGKILL)
        os.waitid(os.P_PID, checking._child, os.WEXITED | os.WNOWAIT)
        path = chain.path / "gen-000000" / "pages-0"
        path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(ImageCorrupt):
            checking.finish()


def test_leaving_early_ends_the_child(chain):
    with Ahead(chain, 0):
        pass
    assert not has_children()
