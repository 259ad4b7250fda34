"""Who may have put an image there: a wary reader takes only what nobody else can have written."""

import os
import stat

import pytest

from ckpt.errors import ImageUntrusted
from ckpt.image.access import ANYBODYS, Access, require_trusted
from ckpt.image.chain import Chain
from ckpt.image.verify import verify_for
from tests.image.make_golden import SMALL_HISTORY, make_chain

WARY = Access()


@pytest.fixture
def path(tmp_path):
    return make_chain(tmp_path / "chain", history=SMALL_HISTORY)


def read_all(path, access):
    verify_for(Chain.open(path, access), 2, decode=True)


def status(mode, uid):
    return os.stat_result((mode, 1, 1, 1, uid, 0, 0, 0, 0, 0))


def test_what_is_ours_is_taken(path):
    read_all(path, WARY)


@pytest.mark.parametrize(
    "part",
    ["", "CKPT", "gen-000000", "gen-000001/manifest", "gen-000002/pages-0"],
)
@pytest.mark.parametrize("bit", [stat.S_IWGRP, stat.S_IWOTH])
def test_what_others_can_write_is_refused_by_name(path, part, bit):
    file = path / part
    mode = stat.S_IMODE(file.stat().st_mode) | bit
    file.chmod(mode)
    with pytest.raises(ImageUntrusted, match=rf"\(mode {mode:04o}\)") as caught:
        read_all(path, WARY)
    assert caught.value.path == str(file)
    read_all(path, ANYBODYS)


def test_what_others_can_only_read_is_taken(path):
    for file in (path, *path.rglob("*")):
        file.chmod(0o755 if file.is_dir() else 0o644)
    read_all(path, WARY)


def test_what_an_older_generation_alone_has_is_not_asked_for(path):
    (path / "gen-000001" / "manifest").chmod(0o666)
    verify_for(Chain.open(path, WARY), 0)


def test_a_file_that_is_opened_to_others_after_it_was_checked_is_refused(path):
    chain = Chain.open(path, WARY)
    verify_for(chain, 2)
    (path / "gen-000002" / "pages-0").chmod(0o622)
    with pytest.raises(ImageUntrusted):
        verify_for(chain, 2)


def test_another_owner_is_refused_unless_it_is_root(tmp_path):
    require_trusted(status(0o600, os.geteuid()), tmp_path)
    require_trusted(status(0o600, 0), tmp_path)
    with pytest.raises(ImageUntrusted, match=f"belongs to user {os.geteuid() + 7}"):
        require_trusted(status(0o600, os.geteuid() + 7), tmp_path)


@pytest.mark.parametrize("levels_up", [1, 2])
def test_a_directory_in_which_everybody_can_swap_it_is_refused(tmp_path, levels_up):
    inner = tmp_path / "one" / "two"
    inner.mkdir(parents=True)
    path = make_chain(inner / "chain", history=SMALL_HISTORY)
    above = path.parents[levels_up - 1]
    above.chmod(0o777)
    with pytest.raises(ImageUntrusted, match=f"chmod o-w {above},"):
        Chain.open(path, WARY)
    above.chmod(0o1777)
    read_all(path, WARY)


def test_the_way_is_that_behind_a_link(tmp_path):
    hidden = tmp_path / "open"
    hidden.mkdir()
    make_chain(hidden / "chain", history=SMALL_HISTORY)
    link = tmp_path / "link"
    link.symlink_to(hidden / "chain")
    read_all(link, WARY)
    hidden.chmod(0o777)
    with pytest.raises(ImageUntrusted):
        Chain.open(link, WARY)
