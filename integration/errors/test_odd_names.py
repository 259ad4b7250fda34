"""Names of files and threads of any bytes: each comes back, and is said in one printable line."""

import ctypes
import json
import mmap
import os
import signal

import pytest

from integration.files.processes import opened_by
from integration.harness import become_subreaper, ckpt, dump

NAMES = [
    pytest.param((b"bytes \xff\xfe", "bytes \\xff\\xfe"), id="no-utf8"),
    pytest.param((b"new\nline\t", "new\\nline\\t"), id="newline"),
    pytest.param((b"esc\x1b[31m", "esc\\x1b[31m"), id="control"),
]
PR_SET_NAME = 15
# As in a locale such as en_US.UTF-8: no byte escapes to stdout.
STRICT = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}


@pytest.fixture(params=NAMES)
def odd(request, tmp_path):
    """A directory and a name in it, both odd, and how the name is said."""
    become_subreaper()
    name, said = request.param
    directory = os.fsencode(tmp_path) + b"/" + name
    os.mkdir(directory)
    return directory, directory + b"/" + name, said


def prepare(directory, path):
    ctypes.CDLL(None).prctl(PR_SET_NAME, os.path.basename(path))
    os.chdir(directory)
    with open(path, "wb") as file:
        file.write(bytes(mmap.PAGESIZE))
    fd = os.open(path, os.O_RDWR)
    return fd, mmap.mmap(fd, mmap.PAGESIZE)


def links_of(pid):
    mapped = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/map_files")}
    with open(f"/proc/{pid}/comm", "rb") as comm:
        return (
            os.readlink(f"/proc/{pid}/cwd"),
            os.readlink(f"/proc/{pid}/fd/3"),
            mapped,
            comm.read(),
        )


def test_a_process_with_odd_names_comes_back(odd, tmp_path):
    directory, path, _ = odd
    image = tmp_path / "image"
    with opened_by(lambda: prepare(directory, path)) as pid:
        before = links_of(pid)
        assert os.fsdecode(path) in before[2]
        checked = ckpt("check", "--pid", pid, env=STRICT)
        assert (checked.returncode, checked.stderr) == (0, "")
        dump(pid, image, "--kill")
        os.waitpid(pid, 0)
        done = ckpt("restore", "--detach", image, env=STRICT)
        assert done.returncode == 0, done.stderr
        assert links_of(pid) == before
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.unlink(path)
        refused = ckpt("restore", "--detach", image, env=STRICT)
        assert refused.returncode == 42
        assert_one_line_each(refused.stderr, odd[2], 2)


def test_what_is_refused_is_said_in_one_line(odd, tmp_path):
    directory, path, said = odd

    def prepare_and_unlink():
        kept = prepare(directory, path)
        os.write(kept[0], bytes(2 << 20))  # more than travels in an image
        os.unlink(path)
        return kept

    with opened_by(prepare_and_unlink) as pid:
        checked = ckpt("check", "--pid", pid, env=STRICT)
        assert checked.returncode == 21
        refusals = checked.stdout[checked.stdout.index("refused:") :]
        assert_one_line_each(f"what is refused:\n{refusals}", said, 3)
        refused = ckpt("dump", "--pid", pid, tmp_path / "image", env=STRICT)
        assert refused.returncode == 21
        assert_one_line_each(refused.stderr, said, 3)
        found = json.loads(ckpt("check", "--pid", pid, "--json", env=STRICT).stdout)["findings"]
        assert os.fsdecode(path) in found[0]["subject"], "a program gets the name itself"


def test_an_image_directory_may_have_an_odd_name(odd):
    _, path, _ = odd
    with opened_by() as pid:
        done = ckpt("dump", "--pid", pid, os.fsdecode(path), env=STRICT)
        assert (done.returncode, done.stderr) == (0, "")
        shown = ckpt("show", os.fsdecode(path), env=STRICT)
        assert (shown.returncode, shown.stderr) == (0, "")


def assert_one_line_each(text, said, n_findings):
    lines = text.splitlines()
    assert len(lines) == 1 + n_findings, text
    assert all(said in line for line in lines[1:])
    assert text.replace("\n", "").isprintable()
