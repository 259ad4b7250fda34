"""The promise: a directory that cannot take a generation is left as it is, and the target too.

Whoever repairs what is named (makes room, chooses another directory) can go on.
"""

import contextlib
import os
import shutil
import subprocess

import pytest

from ckpt.engine.dump import dump as engine_dump
from ckpt.errors import ImageUnusable
from ckpt.image.chain import Chain
from ckpt.image.verify import verify
from integration.errors.refusals import refused, unchanged, untouched
from integration.harness import Restored, ckpt, dump
from integration.workloads.driver import Program
from tests.plugins.tree import TOP

BROKEN = TOP / "images" / "broken"


def run(*command):
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


@contextlib.contextmanager
def mounted(path, *how):
    run("mount", *how, path)
    try:
        yield path
    finally:
        run("umount", "--lazy", path)


def refused_dump(code, work, image):
    """Try a dump that must fail and change nothing; return what it says."""
    with untouched(work.pid), unchanged(image):
        return refused(code, "dump", "--pid", work.pid, "--incremental", image)


# -- where no chain can be -------------------------------------------------------------------------


def test_it_is_a_file(work, tmp_path):
    image = tmp_path / "image"
    image.write_text("a file")
    assert refused_dump(30, work, image) == f"{image}: this is a file, an image is a directory"


def test_its_parent_is_a_file(work, tmp_path):
    (tmp_path / "file").write_text("a file")
    message = refused_dump(30, work, tmp_path / "file" / "image")
    assert message.startswith(f"{tmp_path}/file/image: ")


def test_its_parent_is_missing(work, tmp_path):
    image = tmp_path / "none" / "image"
    message = refused_dump(30, work, image)
    assert message == f"{image}: the directory {tmp_path}/none does not exist: make it first"


def test_it_cannot_be_made_where_it_is(work):
    assert "/proc/image: cannot make it" in refused(30, "dump", "--pid", work.pid, "/proc/image")


def test_it_is_a_link_to_nowhere(work, tmp_path):
    image = tmp_path / "image"
    image.symlink_to(tmp_path / "none")
    assert refused_dump(30, work, image).startswith(f"{image}: ")
    assert not (tmp_path / "none").exists()


def test_it_belongs_to_somebody_else(work, tmp_path):
    image = tmp_path / "image"
    image.mkdir()
    (image / "letter").write_text("dear")
    message = refused_dump(30, work, image)
    assert "not an image directory, and not empty (it has 'letter')" in message


def test_its_name_is_too_long(work, tmp_path):
    message = refused(30, "dump", "--pid", work.pid, tmp_path / ("x" * 300))
    assert "File name too long" in message


@pytest.mark.parametrize("has_chain", [False, True])
def test_it_is_read_only(work, tmp_path, has_chain):
    """Root may write in spite of a mode; what even root may not write is a read-only mount."""
    image = tmp_path / "image"
    image.mkdir()
    if has_chain:
        dump(work.pid, image)
    with mounted(image, "--bind", image):
        run("mount", "-o", "remount,bind,ro", image)
        message = refused_dump(30, work, image)
    assert message == f"{image}: it is not writable for you, or read-only"


# -- where there is no room ------------------------------------------------------------------------


def fill(folder):
    """Take all the room of a file system; return the file that holds it."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 14))
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1))
    return path


@pytest.fixture
def small(tmp_path):
    """A file system of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    with mounted(folder, "-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs"):
        yield folder


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A process with more memory than fits into 3 MiB, which does not compress."""
    with Program(
        "writer", "--mib", "16", "--rate", "2000", cwd=tmp_path_factory.mktemp("writer")
    ) as program:
        yield program
        assert program.ask("check") == "ok"


def test_there_is_no_room_at_all(work, small):
    fill(small)
    message = refused_dump(13, work, small / "image")
    assert "No space left on device: make room" in message
    assert not (small / "image").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_there_is_no_room_for_the_first_generation(writer, small, exists):
    """A chain that was made for it is removed again."""
    image = small / "image"
    if exists:
        image.mkdir()
    with unchanged(image):
        message = refused(13, "dump", "--pid", writer.pid, image)
    assert "No space left on device: make room or choose another image directory" in message
    assert writer.ask("check") == "ok"
    run("mount", "-o", "remount,size=64m", small)
    assert dump(writer.pid, image)["kind"] == "full"


def test_after_a_full_disk_the_next_delta_is_still_complete(work, small, tmp_path):
    """What the tracker told the failed dump is lost: so the next one is full, and says why."""
    image = small / "image"
    dump(work.pid, image)
    assert work.ask("step") == "stepped"
    filler = fill(small)
    with unchanged(image):
        message = refused(13, "dump", "--pid", work.pid, "--incremental", image)
    assert "nothing was added to the chain" in message
    assert verify(Chain.open(image)) == []
    filler.unlink()
    assert work.ask("check") == "ok"
    made = dump(work.pid, image)
    assert (made["generation"], made["kind"]) == (1, "full")
    assert made["reason"] == "this process was not tracked since the last generation"
    assert dump(work.pid, image)["kind"] == "delta"
    # That it can be restored too is shown with a process that may be killed.
    with Program("s_registers", cwd=tmp_path) as other:
        copy = small / "copy"
        dump(other.pid, copy)
        filler = fill(small)
        refused(13, "dump", "--pid", other.pid, "--incremental", "--kill", copy)
        assert other.ask("check") == "ok", "without a commit it is not killed"
        filler.unlink()
        dump(other.pid, copy, "--kill")
    with Restored(copy) as restored:
        assert restored.ask("check") == "ok"


def test_nothing_stays_open_in_us(work, tmp_path):
    image = tmp_path / "image"
    image.write_text("")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ImageUnusable):
        engine_dump(work.pid, image)
    assert os.listdir("/proc/self/fd") == before


# -- where there is another chain ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defect", "code", "phrase"),
    [
        ("newer-major-version", 32, "CKPT has format 3.0, this ckpt reads"),
        ("damaged-header", 31, "CKPT is damaged: "),
        ("missing-header", 30, "it is not an image directory, and not empty"),
    ],
)
def test_a_chain_that_cannot_be_continued(work, tmp_path, defect, code, phrase):
    image = tmp_path / "image"
    shutil.copytree(BROKEN / defect, image, symlinks=True)
    assert phrase in refused_dump(code, work, image)


@pytest.mark.parametrize(
    ("defect", "code", "phrase"),
    [
        ("newer-major-manifest", 32, "gen-000002/manifest has format 3.0"),
        ("other-chain", 33, "belongs to chain ffeeddcc"),
    ],
)
def test_a_newest_generation_that_cannot_be_read(work, tmp_path, defect, code, phrase):
    """Nothing is put on top of what is broken: a user would take it for a good chain."""
    image = tmp_path / "image"
    shutil.copytree(BROKEN / defect, image, symlinks=True)
    (image / "lock").touch(0o600)
    assert phrase in refused_dump(code, work, image)


def test_a_damaged_newest_generation_keeps_nobody_from_making_another(work, tmp_path):
    image = tmp_path / "image"
    shutil.copytree(BROKEN / "truncated-manifest", image, symlinks=True)
    made = dump(work.pid, image)
    assert made["kind"] == "full"
    assert "the newest generation is damaged" in made["reason"]
    assert "gen-000002/manifest is damaged" in made["reason"]


def test_a_chain_that_is_in_use(work, tmp_path):
    image = tmp_path / "image"
    dump(work.pid, image)
    with Chain.open(image).lock():
        message = refused_dump(35, work, image)
        assert ckpt("show", image).returncode == 0, "reading needs no lock"
    assert message == f"{image} is in use by another ckpt: wait until it has ended"


def test_a_chain_of_another_process(work, tmp_path):
    """That is no error: it is asked for, but a full generation it must be."""
    image = tmp_path / "image"
    with Program("s_registers", cwd=tmp_path) as other:
        dump(other.pid, image)
        made = dump(work.pid, image)
        assert (made["generation"], made["kind"]) == (1, "full")
        made = dump(other.pid, image)
        assert (made["generation"], made["kind"]) == (2, "delta"), made["reason"]


def test_a_parent_that_is_missing(work, tmp_path):
    image = tmp_path / "image"
    dump(work.pid, image)
    dump(work.pid, image)
    shutil.rmtree(image / "gen-000000")
    made = dump(work.pid, image)
    assert (made["generation"], made["kind"]) == (2, "full")
    assert "the chain is not whole" in made["reason"]
