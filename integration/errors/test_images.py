"""The promise: an image that is not what was written is refused before there is any process."""

import shutil

import pytest

from integration.errors.refusals import nobody_left, refused, unchanged
from integration.harness import Restored, dump
from integration.workloads.driver import Program


def flip_bit(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


def cut(path, n_bytes):
    path.write_bytes(path.read_bytes()[:-n_bytes])


def refused_restore(code, dead, *options):
    image, pid = dead
    with nobody_left(pid), unchanged(image):
        return refused(code, "restore", *options, image)


def newest(image):
    return image / "gen-000001"


def oldest(image):
    return image / "gen-000000"


DAMAGES = {
    "a bit of a page": (
        lambda image: flip_bit(newest(image) / "pages-0", 40),
        31,
        "gen-000001/pages-0",
    ),
    "a bit of a page of the parent": (
        lambda image: flip_bit(oldest(image) / "pages-0", -40),
        31,
        "gen-000000/pages-0 is damaged: frame",
    ),
    "a bit of the manifest": (
        lambda image: flip_bit(newest(image) / "manifest", 100),
        31,
        "gen-000001/manifest is damaged",
    ),
    "a bit of the parent's manifest": (
        lambda image: flip_bit(oldest(image) / "manifest", 100),
        31,
        "gen-000000/manifest is damaged",
    ),
    "a bit of the header": (lambda image: flip_bit(image / "CKPT", 3), 31, "CKPT is damaged"),
    "pages cut short": (lambda image: cut(newest(image) / "pages-0", 1), 31, "its manifest says"),
    "manifest cut short": (lambda image: cut(newest(image) / "manifest", 9), 31, "is damaged"),
    "empty manifest": (
        lambda image: (newest(image) / "manifest").write_bytes(b""),
        31,
        "gen-000001/manifest is damaged",
    ),
    "no pages": (lambda image: (newest(image) / "pages-0").unlink(), 31, "it is missing"),
    "no manifest": (lambda image: (newest(image) / "manifest").unlink(), 31, "it is missing"),
    "no parent": (
        lambda image: shutil.rmtree(oldest(image)),
        33,
        "generation 1 was made against it",
    ),
    "no newest generation": (
        lambda image: shutil.rmtree(newest(image)),
        33,
        "it was the newest generation, and is gone: put it back, or take the newest that is left"
        " with --at 0 (",
    ),
    "a parent of the same number": (
        lambda image: shutil.copyfile(newest(image) / "manifest", oldest(image) / "manifest"),
        31,
        "it is generation 1 under the name of 0",
    ),
    "a directory in place of a file": (
        lambda image: [(newest(image) / "pages-0").unlink(), (newest(image) / "pages-0").mkdir()],
        31,
        "no regular file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_image(damage, dead):
    spoil, code, phrase = DAMAGES[damage]
    spoil(dead[0])
    message = refused_restore(code, dead)
    assert phrase in message
    assert str(dead[0]) in message


def test_a_generation_that_damage_did_not_reach_is_restored(dead):
    flip_bit(newest(dead[0]) / "pages-0", 40)
    with Restored(dead[0], "--at", "0") as work:
        assert work.ask("check") == "ok"


def test_a_newest_generation_that_is_gone_is_not_passed_over_unasked(dead):
    image = dead[0]
    shutil.rmtree(newest(image))
    with Restored(image, "--at", "0") as work:
        assert work.ask("check") == "ok"
        made = dump(work.pid, image)
        assert (made["generation"], made["kind"]) == (2, "delta"), "no number is given twice"
    with Restored(image) as work:
        assert work.said["generation"] == 2
        assert work.ask("check") == "ok"


def test_a_generation_that_does_not_exist(dead):
    message = refused_restore(34, dead, "--at", "2")
    assert message == f"{dead[0]} has no generation 2; it has 0, 1"


def test_the_parent_of_another_chain(dead, tmp_path):
    """Of the same program, with the same number, even with the same layout: but another."""
    other = tmp_path / "other"
    with Program("s_registers", cwd=tmp_path) as program:
        dump(program.pid, other)
    shutil.rmtree(oldest(dead[0]))
    shutil.copytree(oldest(other), oldest(dead[0]))
    assert "it belongs to chain" in refused_restore(33, dead)
