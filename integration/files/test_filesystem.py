"""Working directory, root, file mode mask."""

import os

import pytest

from ckpt.kernel.arch import NR
from ckpt.process.remote import In, Out, call
from ckpt.resources.base import RestoreOptions
from ckpt.resources.filesystem import FILESYSTEM
from integration.files.processes import capture, look, opened_by, rebuilt


@pytest.fixture
def jail(tmp_path):
    (tmp_path / "jail" / "inside").mkdir(parents=True)
    return tmp_path / "jail"


def test_directory_and_mask_come_back(tmp_path):
    where = tmp_path / "a directory \udcff"
    where.mkdir()

    def prepare():
        os.chdir(where)
        os.umask(0o137)

    with opened_by(prepare) as pid:
        files, record = capture(pid), capture(pid, FILESYSTEM)
    with rebuilt(files, pid) as built:
        built.restore(FILESYSTEM, record)
        assert built.capture(FILESYSTEM) == record
        assert (record.cwd, record.root, record.umask) == (str(where), "/", 0o137)


def test_a_changed_root_comes_back(jail):
    def prepare():
        os.chroot(jail)
        os.chdir("/inside")

    with opened_by(prepare) as pid:
        files, record = capture(pid), capture(pid, FILESYSTEM)
    with rebuilt(files, pid) as built:
        built.restore(FILESYSTEM, record)
        assert built.capture(FILESYSTEM) == record
        (reply,) = built.run([call(NR.getcwd, Out(100), 100)])
        assert reply.outs[0][: reply.value] == b"/inside\0"
        assert built.run([call(NR.access, In(b"/etc\0"), 0)])[0].error


def test_a_working_directory_outside_the_root_comes_back(jail):
    def prepare():
        os.chdir(jail.parent)
        os.chroot(jail)

    with opened_by(prepare) as pid:
        files, record = capture(pid), capture(pid, FILESYSTEM)
    with rebuilt(files, pid) as built:
        built.restore(FILESYSTEM, record)
        assert built.capture(FILESYSTEM) == record


def test_a_deleted_root_is_refused(tmp_path):
    where = tmp_path / "gone"
    where.mkdir()

    def prepare():
        os.chdir("/")
        os.chroot(where)

    with opened_by(prepare) as pid:
        where.rmdir()
        found = look(pid, FILESYSTEM)
    assert f"root directory {where} (deleted): is deleted, which is not supported" in found


def test_a_directory_that_is_missing_is_named(tmp_path):
    where = tmp_path / "gone"
    where.mkdir()
    with opened_by(lambda: os.chdir(where)) as pid:
        record = capture(pid, FILESYSTEM)
    where.rmdir()
    found = [str(finding) for finding in FILESYSTEM.check_files(record, RestoreOptions())]
    assert found == [
        f"working directory {where}: cannot be opened (No such file or directory)"
        " (make the directory)"
    ]
