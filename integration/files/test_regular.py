"""Regular files, directories and devices: offsets, flags, sharing, and what may have changed."""

import contextlib
import ctypes
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from ckpt.errors import RestoreFailed, UnsupportedState, UsageError
from ckpt.kernel.arch import NR
from ckpt.kernel.libc import syscall
from ckpt.process.remote import Out, call
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.files.table import FILES
from ckpt.resources.filesystem import FILESYSTEM
from integration.files.processes import brought_back, capture, look, opened_by, rebuilt

CLONE_FS, CLONE_FILES = 0x200, 0x400


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a text with spaces"
    path.write_bytes(bytes(range(256)) * 16)
    return str(path)


def findings(record, **options):
    warnings = []
    chosen = RestoreOptions(warn=warnings.append, **options)
    return [str(finding) for finding in FILES.check_files(record, chosen)], warnings


def touch_later(path):
    """Change the modification time and nothing else."""
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def test_offset_flags_and_close_on_exec_come_back(text):
    def prepare():
        os.lseek(os.open(text, os.O_RDONLY), 777, os.SEEK_SET)
        os.set_inheritable(3, True)
        fd = os.open(text, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_DSYNC)
        os.lseek(fd, 5, os.SEEK_SET)
        os.open(text, os.O_RDWR | os.O_NOATIME | os.O_NOFOLLOW)

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        assert built.read(3, 3) == bytes((9, 10, 11))
        assert [entry.close_on_exec for entry in record.fds][3:] == [False, True, True]


def test_duplicates_share_their_offset_and_twins_do_not(text):
    def prepare():
        first = os.open(text, os.O_RDONLY)
        os.dup2(first, 700)
        os.open(text, os.O_RDONLY)

    with brought_back(prepare) as (record, built):
        assert len(record.descriptions) == 3
        assert built.read(3, 10) == bytes(range(10))
        assert built.read(700, 2) == bytes((10, 11))
        assert built.read(4, 2) == bytes((0, 1))


def test_nothing_else_is_open_afterwards(text):
    def prepare():
        os.dup2(os.open(text, os.O_RDONLY), 20)
        os.close(3)
        os.close(1)

    with brought_back(prepare) as (_, built):
        assert sorted(map(int, os.listdir(f"/proc/{built.pid}/fd"))) == [0, 2, 20]


def test_an_offset_beyond_the_end_comes_back(text):
    def prepare():
        os.lseek(os.open(text, os.O_RDONLY), 1 << 40, os.SEEK_SET)

    with brought_back(prepare) as (record, built):
        assert built.capture() == record


def test_paths_that_are_open_by_name_only(text, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(text)
    sock = tmp_path / "fifo"
    os.mkfifo(sock)

    def prepare():
        os.open(text, os.O_PATH)
        os.open(link, os.O_PATH | os.O_NOFOLLOW)
        os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
        os.open(sock, os.O_PATH)
        os.open("/dev/null", os.O_PATH)

    def change():
        touch_later(text)

    with brought_back(prepare, meanwhile=change) as (record, built):
        assert built.capture().fds == record.fds
        modes = [os.stat(f"/proc/{built.pid}/fd/{fd}").st_mode for fd in range(3, 8)]
        assert list(map(stat.S_IFMT, modes)) == [
            stat.S_IFREG,
            stat.S_IFLNK,
            stat.S_IFDIR,
            stat.S_IFIFO,
            stat.S_IFCHR,
        ]
        assert [d.flags & os.O_PATH for d in record.descriptions[1:]] == [os.O_PATH] * 5


def test_a_directory_listing_goes_on(tmp_path):
    listed, seen = tmp_path / "listed", tmp_path / "seen"
    listed.mkdir()
    names = {f"entry-{n:03}" for n in range(300)}
    for name in names:
        (listed / name).touch()

    def prepare():
        seen.write_bytes(_getdents(os.open(listed, os.O_RDONLY | os.O_DIRECTORY), 4096))

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        before, after = _names(seen.read_bytes()), set()
        while raw := _remote_getdents(built):
            after |= _names(raw)
    assert 0 < len(before) < len(names)
    assert before.isdisjoint(after)
    assert before | after == names | {".", ".."}


def _getdents(fd, size):
    buffer = ctypes.create_string_buffer(size)
    n_bytes = syscall(NR.getdents64, fd, ctypes.addressof(buffer), size)
    return buffer.raw[:n_bytes]


def _remote_getdents(built):
    (reply,) = built.run([call(NR.getdents64, 3, Out(4096), 4096)])
    assert reply.ok, str(reply)
    return reply.outs[0][: reply.value]


def _names(raw):
    names, at = set(), 0
    while at < len(raw):
        length = int.from_bytes(raw[at + 16 : at + 18], "little")
        names.add(raw[at + 19 : at + length].split(b"\0")[0].decode())
        at += length
    return names


def test_devices_come_back():
    devices = ("null", "zero", "full", "random", "urandom")

    def prepare():
        for name in devices:
            os.open(f"/dev/{name}", os.O_RDWR)

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        assert built.read(4, 4) == bytes(4)
        assert len(built.read(7, 16)) == 16


def test_files_that_the_kernel_makes_up_need_not_be_as_old():
    def prepare():
        fd = os.open("/proc/meminfo", os.O_RDONLY)
        os.read(fd, 10)
        os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY)

    with brought_back(prepare) as (record, built):
        assert built.capture().fds == record.fds
        assert os.path.samestat(os.stat(f"/proc/{built.pid}/fd/3"), os.stat("/proc/meminfo"))


# ---- what has changed since ----------------------------------------------------------------------


def test_a_file_that_is_only_read_must_be_the_same(text):
    with opened_by(lambda: os.open(text, os.O_RDONLY)) as pid:
        record = capture(pid)
    assert findings(record) == ([], [])
    touch_later(text)
    (finding,), _ = findings(record)
    assert finding.startswith(f"fd 3 ({text}): was written to since the checkpoint")
    assert f"--allow-changed {text}" in finding
    assert findings(record, allow_changed=frozenset({text})) == ([], [])


def test_a_file_that_is_written_may_have_grown(text):
    def prepare():
        os.lseek(os.open(text, os.O_WRONLY), 0, os.SEEK_END)
        os.open(text, os.O_RDONLY)

    with opened_by(prepare) as pid:
        record = capture(pid)
    with open(text, "ab") as file:
        file.write(b"a line more")
    found, warnings = findings(record)
    assert found == []
    assert len(warnings) == 1
    assert f"{text} has 4107 bytes now, had 4096" in warnings[0]
    with rebuilt(record, pid) as built:
        assert built.write(3, b"A LINE") == 6
    with open(text, "rb") as file:
        assert file.read()[4096:] == b"A LINE more"


def test_a_file_that_is_written_in_place_is_taken_with_a_warning(text):
    with opened_by(lambda: os.open(text, os.O_RDWR)) as pid:
        record = capture(pid)
    touch_later(text)
    found, warnings = findings(record)
    assert found == []
    assert warnings == [f"{text} was written to since the checkpoint, and is taken as it is"]


def test_a_file_that_shrank_below_an_offset_in_use_is_refused(text):
    def prepare():
        os.lseek(os.open(text, os.O_WRONLY), 3000, os.SEEK_SET)

    with opened_by(prepare) as pid:
        record = capture(pid)
    os.truncate(text, 3000)
    assert findings(record)[0] == []
    os.truncate(text, 2999)
    assert "has 2999 bytes now, and the process is at byte 3000" in findings(record)[0][0]


def test_missing_files_are_all_named(text, tmp_path):
    other = tmp_path / "other"
    other.mkdir()

    def prepare():
        os.open(text, os.O_RDWR)
        os.open(other, os.O_RDONLY)

    with opened_by(prepare) as pid:
        record = capture(pid)
    os.unlink(text)
    other.rmdir()
    found, _ = findings(record)
    assert found == [
        f"fd 3 ({text}): cannot be opened (No such file or directory) (put the file back)",
        f"fd 4 ({other}): cannot be opened (No such file or directory) (make the directory)",
    ]


def test_another_kind_of_file_under_the_name_is_refused(text):
    with opened_by(lambda: os.open(text, os.O_RDWR)) as pid:
        record = capture(pid)
    os.unlink(text)
    os.mkfifo(text)
    assert "is no regular file any more" in findings(record)[0][0]


def test_a_program_is_known_by_its_build_id(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(Path("/bin/true").read_bytes())
    with opened_by(lambda: os.open(program, os.O_RDONLY)) as pid:
        record = capture(pid)
    touch_later(program)
    assert findings(record) == ([], [])
    program.write_bytes(Path("/bin/false").read_bytes())
    assert len(findings(record)[0]) == 1


def test_a_failed_prepare_leaves_nothing_open(text, tmp_path):
    gone = tmp_path / "gone"
    gone.touch()

    def prepare():
        os.open(text, os.O_RDONLY)
        os.open(gone, os.O_RDONLY)

    with opened_by(prepare) as pid:
        record = capture(pid)
    gone.unlink()
    before = os.listdir("/proc/self/fd")
    with (
        contextlib.ExitStack() as helpers,
        pytest.raises(RestoreFailed, match=f"opening {gone}: No such file"),
    ):
        FILES.prepare(record, Opening(RestoreOptions(), helpers))
    assert os.listdir("/proc/self/fd") == before


# ---- what is refused -----------------------------------------------------------------------------


def lose_name(text, other):
    os.open(text, os.O_RDWR | os.O_APPEND)
    os.lseek(3, 4, os.SEEK_SET)
    os.link(text, other)
    os.unlink(text)


def test_a_file_that_has_another_name_now_is_found_by_that(text, tmp_path):
    other = tmp_path / "another name"
    with opened_by(lambda: lose_name(text, other)) as pid:
        record = capture(pid)
    with rebuilt(record, pid) as again:
        assert os.readlink(f"/proc/{pid}/fd/3") == f"{text} (deleted)"
        assert os.path.samestat(os.stat(f"/proc/{pid}/fd/3"), other.stat())
        assert again.read(3, 3) == other.read_bytes()[4:7]
        assert os.listdir(tmp_path) == [other.name]
    Path(text).write_text("somebody else's")
    with rebuilt(record, pid):
        assert os.readlink(f"/proc/{pid}/fd/3") == str(other)
    assert Path(text).read_text() == "somebody else's"


@contextlib.contextmanager
def covered(folder):
    """Let what is in a directory be out of reach."""
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("where", ["below/deep", "../beside"])
def test_a_file_whose_other_name_is_elsewhere_is_found(text, tmp_path, where):
    other = tmp_path / where / "file"
    other.parent.mkdir(parents=True)
    with brought_back(lambda: lose_name(text, other)) as (_, built):
        opened = f"/proc/{built.pid}/fd/3"
        assert not Path(text).exists()
        assert os.readlink(opened) == f"{text} (deleted)"
        assert os.path.samestat(os.stat(opened), other.stat())
        assert built.read(3, 3) == other.read_bytes()[4:7]


def test_a_file_whose_other_name_is_out_of_reach_is_refused(text, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    with opened_by(lambda: lose_name(text, hidden / "file")) as pid, covered(hidden):
        (found,) = look(pid)
    assert found.startswith(f"fd 3 ({text} (deleted)): is deleted, but has another name")


def test_a_file_that_has_another_ones_name_is_refused(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "file").write_text("below")
    mounted = False
    try:
        with opened_by(lambda: os.open(hidden / "file", os.O_RDONLY)) as pid:
            subprocess.run(["mount", "-t", "tmpfs", "none", hidden], check=True)
            mounted = True
            (hidden / "file").write_text("above")
            (found,) = look(pid)
        assert "another file has its name" in found
    finally:
        if mounted:
            subprocess.run(["umount", hidden], check=True)


def test_inherit_must_name_a_descriptor_of_the_process(text):
    with opened_by(lambda: os.open(text, os.O_RDONLY)) as pid:
        record = capture(pid)
    with pytest.raises(UsageError, match="--inherit 4"):
        findings(record, inherit={4: "/dev/null"})


# ---- what happens between look and freeze


def test_a_file_that_is_renamed_after_the_look_is_known_by_its_new_name(text, tmp_path):
    with opened_by(lambda: os.open(text, os.O_RDONLY)) as pid:
        record = capture(pid, meanwhile=lambda: os.rename(text, tmp_path / "new"))
    assert record.descriptions[-1].record.file.path == str(tmp_path / "new")


def test_a_file_that_is_written_after_the_look_is_known_as_it_is_then(text):
    with opened_by(lambda: os.open(text, os.O_RDWR)) as pid:
        record = capture(pid, meanwhile=lambda: os.truncate(text, 17))
    assert record.descriptions[-1].record.file.size_bytes == 17


def test_a_file_that_loses_its_name_after_the_look_is_refused(text):
    def meanwhile():
        os.mkdir(f"{text} elsewhere")
        os.link(text, f"{text} elsewhere/file")
        os.unlink(text)

    with (
        opened_by(lambda: os.open(text, os.O_RDONLY)) as pid,
        pytest.raises(UnsupportedState, match="is deleted"),
    ):
        capture(pid, meanwhile=meanwhile)


# ---- threads


@pytest.mark.parametrize(
    ("flag", "resource", "problem"),
    [
        (CLONE_FILES, FILES, "has descriptors of its own, which is not supported yet"),
        (CLONE_FS, FILESYSTEM, "has a working directory of its own, which is not supported yet"),
    ],
)
def test_a_thread_with_a_table_of_its_own_is_refused(flag, resource, problem, tmp_path):
    def live(ready):
        assert ctypes.CDLL(None).unshare(flag) == 0
        (tmp_path / "tid").write_text(str(threading.get_native_id()))
        ready.set()
        threading.Event().wait()

    def prepare():
        ready = threading.Event()
        threading.Thread(target=live, args=(ready,), daemon=True).start()
        ready.wait()

    with opened_by(prepare) as pid:
        found = look(pid, resource)
    assert found == [f"thread {(tmp_path / 'tid').read_text()}: {problem}"]
