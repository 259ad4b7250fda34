"""The promise: an encrypted image grows without a secret, and gives nothing back without.

Whoever dumps knows the recipient alone. Whoever restores needs the private key; without it, or with
another, nothing is started and nothing of the process can be read.
"""

import json

import pytest

from ckpt.image.access import Access
from ckpt.image.chain import Chain
from ckpt.image.keys import PrivateKey, write_private_key
from ckpt.image.verify import verify
from integration.errors.refusals import nobody_left, refused, unchanged, untouched
from integration.harness import Restored, become_subreaper, ckpt, dump
from integration.workloads.driver import Program

KEY, OTHER = PrivateKey.generate(), PrivateKey.generate()
RECIPIENT = str(KEY.recipient)
become_subreaper()


@pytest.fixture(scope="module", autouse=True)
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    write_private_key(folder / "ours", KEY)
    write_private_key(folder / "other", OTHER)
    return folder


@pytest.fixture(scope="module")
def ours(keys):
    return "--identity", str(keys / "ours")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Take a full checkpoint and two deltas, without any private key."""
    folder = tmp_path_factory.mktemp("where-nobody-may-know")
    image = folder / "image"
    with Program("writer", "--mib", "8", "--threads", "1", "--rate", "1000", cwd=folder) as work:
        made = [dump(work.pid, image, "--encrypt-to", RECIPIENT), dump(work.pid, image)]
        assert work.ask("check") == "ok"
        made.append(dump(work.pid, image, "--kill"))
    assert [one["kind"] for one in made] == ["full", "delta", "delta"]
    return image


def everything_in(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_every_generation_comes_back_and_goes_on(image, ours):
    with Restored(image, "--at", "1", "--lazy", *ours) as work:
        assert work.ask("check") == "ok"
    with Restored(image, *ours) as work:
        assert work.ask("check") == "ok"
        assert dump(work.pid, image)["kind"] == "delta", "it takes no key"
        assert work.ask("check") == "ok"


def test_it_can_be_verified_with_the_key_and_without(image):
    assert verify(Chain.open(image, Access(private=(KEY,)))) == []
    assert verify(Chain.open(image)) == []


def test_without_the_key_nothing_is_started(image, keys):
    with nobody_left(), unchanged(image):
        assert "it is encrypted: give --identity" in refused(37, "restore", image)
        refused(37, "restore", "--lazy", image)
        said = refused(37, "restore", "--identity", keys / "other", image)
    assert said.startswith(f"{image}: it is encrypted to {RECIPIENT}, and ")


def test_what_was_altered_is_found_before_anything_is_started(image, ours):
    pages = image / "gen-000000" / "pages-0"
    good = pages.read_bytes()
    pages.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    try:
        with nobody_left():
            assert "pages-0 is damaged: frame 0" in refused(31, "restore", *ours, image)
    finally:
        pages.write_bytes(good)


def test_nothing_of_the_process_can_be_read(image, ours):
    folder = str(image.parent).encode()
    assert folder in repr(Chain.open(image, Access(private=(KEY,))).manifest(0).records).encode()
    assert folder not in everything_in(image)
    shown = json.loads(ckpt("show", "--json", image).stdout)
    assert shown["encrypted_to"] == [RECIPIENT]
    assert [one["host"] for one in shown["generations"]] == [None] * len(shown["generations"])
    opened = json.loads(ckpt("show", "--json", *ours, image).stdout)
    assert opened["generations"][0]["host"]["pid"]
    assert RECIPIENT in ckpt("show", image).stdout


def test_a_chain_stays_as_it_was_begun(image, tmp_path):
    plain = tmp_path / "plain"
    with Program("s_registers", cwd=tmp_path) as work:
        dump(work.pid, plain)
        with untouched(work.pid), unchanged(plain, image):
            said = refused(30, "dump", "--pid", work.pid, "--encrypt-to", RECIPIENT, plain)
            assert "it is not encrypted, and stays so" in said
            other = str(OTHER.recipient)
            said = refused(30, "dump", "--pid", work.pid, "--encrypt-to", other, image)
            assert f"it is encrypted to {RECIPIENT}: " in said


def test_comparing_with_old_pages_takes_the_key(tmp_path, ours):
    image = tmp_path / "image"
    how = ("--tracker", "compare")
    with Program("s_registers", cwd=tmp_path) as work:
        # One file is enough for both ends: it is taken for its public half.
        dump(work.pid, image, *how, "--encrypt-to", ours[1])
        assert Chain.open(image).recipients == (KEY.recipient,)
        with untouched(work.pid), unchanged(image):
            said = refused(37, "dump", "--pid", work.pid, "--incremental", *how, image)
        assert "the tracker 'compare' reads what is in it" in said
        assert dump(work.pid, image, *how, *ours)["kind"] == "delta"
    with Restored(image, *ours) as work:
        assert work.ask("check") == "ok"


def test_what_has_no_name_is_stored_whole_without_the_key(tmp_path, ours):
    image = tmp_path / "image"
    with Program("s_shared", cwd=tmp_path) as work:
        dump(work.pid, image, "--encrypt-to", RECIPIENT)
        whole, compared = dump(work.pid, image), dump(work.pid, image, *ours)
    assert whole["kind"] == compared["kind"] == "delta"
    assert whole["pages"]["data"] > compared["pages"]["data"]
    assert any("to compare it with an encrypted checkpoint" in said for said in whole["warnings"])
    assert compared["warnings"] == []
    with Restored(image, "--at", "1", *ours) as work:
        assert work.ask("check") == "ok"
