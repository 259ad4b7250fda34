"""The promise: nobody gets his code run by somebody else's restore of an image that he could write.

What is refused is named, nothing is started, and whoever says that he trusts it gets the process.
"""

import os
import shutil

import pytest

from integration.errors.refusals import nobody_left, refused, unchanged
from integration.harness import Restored, dump
from integration.workloads.driver import Program

NOBODY = 65534


@pytest.fixture
def image(tmp_path):
    directory = tmp_path / "image"
    umask = os.umask(0)
    try:
        with Program("writer", "--rate", "100", cwd=tmp_path) as work:
            dump(work.pid, directory)
            dump(work.pid, directory, "--kill")
    finally:
        os.umask(umask)
    return directory


def set_mode(path):
    path.chmod(0o666)


def give_away(path):
    shutil.chown(path, NOBODY)


@pytest.mark.parametrize(
    ("spoil", "part", "words", "how"),
    [
        (set_mode, "gen-000000/pages-0", "others than its owner can write to it (mode 0666)", ()),
        (give_away, "gen-000001/manifest", f"it belongs to user {NOBODY}", ("--lazy",)),
        (give_away, "", f"it belongs to user {NOBODY}", ()),
    ],
)
def test_it_is_restored_only_by_who_trusts_it(image, spoil, part, words, how):
    spoil(image / part)
    with unchanged(image), nobody_left():
        message = refused(36, "restore", *how, image)
    assert message.startswith(f"{image / part}: {words}")
    with Restored(image, "--trust-image", *how) as work:
        assert work.ask("check") == "ok"
