"""What has no name travels in the image up to a limit; what cannot travel is named before all."""

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

import pytest

from ckpt.resources.content import CONTENTS
from ckpt.resources.memory import MEMORY
from integration.files.processes import look, opened_by
from integration.harness import become_subreaper, ckpt, dump
from integration.resources.test_memory import brought_back

LIMIT = 1 << 20
_NR_MEMFD_SECRET = 447
_MFD_HUGETLB = 4
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def _subreaper():
    become_subreaper()


def delete_open_file(path, n_bytes, size_bytes=None):
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.write(fd, os.urandom(n_bytes))
    os.truncate(fd, size_bytes or n_bytes)
    os.unlink(path)


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]


def test_a_deleted_file_over_the_limit_is_refused_with_the_option_that_takes_it(tmp_path):
    path, image = tmp_path / "big", tmp_path / "image"
    with opened_by(lambda: delete_open_file(path, LIMIT + 4096)) as pid:
        refused = ckpt("dump", "--pid", str(pid), image)
        assert refused.returncode == 21
        assert f"fd 3 ({path} (deleted)): is deleted" in refused.stderr
        assert f"--ghost-limit {LIMIT + 4096}" in refused.stderr
        assert state_of(pid) == "T"
        assert not image.exists()
        dump(pid, image, "--ghost-limit", str(LIMIT + 4096), "--kill")
        with brought_back(pid, image):
            assert os.stat(f"/proc/{pid}/fd/3").st_size == LIMIT + 4096


def test_holes_do_not_count(tmp_path):
    with opened_by(lambda: delete_open_file(tmp_path / "sparse", 4096, 1 << 40)) as pid:
        assert look(pid, CONTENTS) == []
        dump(pid, tmp_path / "image", "--kill")
        with brought_back(pid, tmp_path / "image"):
            status = os.stat(f"/proc/{pid}/fd/3")
            assert (status.st_size, status.st_nlink) == (1 << 40, 0)
            assert status.st_blocks <= 64


def test_a_mapped_file_over_the_limit_is_refused(tmp_path):
    path = tmp_path / "library"

    def prepare():
        path.write_bytes(bytes([1]) * (LIMIT + 1))
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        path.unlink()
        return mapped

    with opened_by(prepare) as pid:
        findings = look(pid, CONTENTS)
        assert findings[0].startswith("memory ")
        assert all(str(path) in one and "--ghost-limit" in one for one in findings)
        assert look(pid, MEMORY) == []


def test_shared_memory_has_no_limit():
    name = f"/dev/shm/ckpt-test-{os.getpid()}"

    def prepare():
        os.truncate(os.memfd_create("big"), 4 * LIMIT)
        delete_open_file(name, 2 * LIMIT)
        return mmap.mmap(-1, 3 * LIMIT)

    with opened_by(prepare) as pid:
        assert look(pid, CONTENTS) == []


def test_secret_memory_is_refused():
    fd = libc.syscall(_NR_MEMFD_SECRET, 0)
    if fd < 0:
        pytest.skip("this kernel has no memfd_secret, or not switched on")
    os.close(fd)

    def prepare():
        secret = libc.syscall(_NR_MEMFD_SECRET, 0)
        os.truncate(secret, 4096)
        return mmap.mmap(secret, 4096)

    with opened_by(prepare) as pid:
        assert any("secret" in finding for finding in look(pid, MEMORY))


def test_a_memfd_of_huge_pages_is_refused():
    with opened_by(lambda: os.memfd_create("huge", _MFD_HUGETLB)) as pid:
        (finding,) = look(pid, CONTENTS)
        assert (
            finding
            == "fd 3 (/memfd:huge (deleted)): is a memfd of huge pages, which is not supported yet"
        )


def test_a_program_whose_file_was_replaced_comes_back(tmp_path):
    """As after an upgrade: the running program and its file have only the name in common."""
    import shutil
    import subprocess

    program = tmp_path / "program"
    shutil.copy("/bin/cat", program)
    with subprocess.Popen([program], stdin=-1, stdout=-1, start_new_session=True) as child:
        child.stdin.write(b"hello\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"hello\n"
        program.unlink()
        program.write_text("another")
        dump(child.pid, tmp_path / "image", "--kill")
        child.wait()
        done = ckpt("restore", tmp_path / "image", input="again\n", stdin=None)
        assert done.stdout == "again\n", done.stderr
        assert program.read_text() == "another"
        assert sorted(os.listdir(tmp_path)) == ["image", "program"]


def test_posix_shared_memory_is_as_it_was_and_who_has_it_still_keeps_his(tmp_path):
    path = Path(f"/dev/shm/ckpt-test-{os.getpid()}")
    path.write_bytes(b"then" * 1024)
    ours = os.open(path, os.O_RDONLY)
    try:

        def prepare():
            fd = os.open(path, os.O_RDWR)
            return mmap.mmap(fd, 4096)

        with opened_by(prepare) as pid:
            dump(pid, tmp_path / "image", "--kill")
            path.write_bytes(b"now")
            with brought_back(pid, tmp_path / "image"):
                assert path.read_bytes() == b"then" * 1024
                assert os.pread(ours, 10, 0) == b"now"
                assert os.path.samestat(path.stat(), os.stat(f"/proc/{pid}/fd/3"))
    finally:
        os.close(ours)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
