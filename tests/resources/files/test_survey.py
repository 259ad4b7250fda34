"""The promise: what is read twice is what is there the second time, whatever happened in between.

The process that is read is this one; nothing depends on its being stopped.
"""

import contextlib
import fcntl
import os
import resource
import signal

import pytest

from ckpt.errors import TargetGone
from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp
from ckpt.kernel.procfs.held import Descriptors
from ckpt.resources.base import Tree
from ckpt.resources.files import survey as module
from ckpt.resources.files.fd_table import FdTables
from ckpt.resources.files.survey import Survey, parse_status
from ckpt.units import Pid

ME = Pid(os.getpid())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").write_bytes(b"first file")
    (tmp_path / "b").write_bytes(b"second")
    return tmp_path


@pytest.fixture(params=["held", "by path", "not held"])
def prepared(request, monkeypatch):
    """Return what makes a survey, with all files held open, or with too few allowed for that."""
    if request.param == "not held":
        monkeypatch.setattr(Descriptors, "make_room", lambda _self, _n: False)
    opened = contextlib.ExitStack()

    def prepare():
        made = Survey(ME)
        opened.callback(made.close)
        made.prepare()
        found = made.read()
        if request.param == "by path":
            made.ask_by_path(found)
        return made

    with opened:
        yield prepare


def test_the_kernels_stat_is_that_of_python(folder):
    import ctypes

    from ckpt.kernel.arch import NR
    from ckpt.kernel.libc import syscall

    for path in (folder / "a", folder, "/dev/null"):
        raw = ctypes.create_string_buffer(144)
        name = ctypes.create_string_buffer(os.fsencode(path))
        syscall(NR.stat, ctypes.addressof(name), ctypes.addressof(raw))
        ours, pythons = parse_status(raw.raw), os.stat(path)
        for field in [name for name in dir(pythons) if name.startswith("st_")]:
            assert getattr(ours, field) == getattr(pythons, field), field


def read(survey, fd):
    raw = survey.read()[fd]
    assert raw.link == os.readlink(f"/proc/self/fd/{fd}")
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        assert raw.info == file.read()
    assert raw.status == os.fstat(fd)
    return raw


def test_what_did_not_change_is_the_same_object(folder):
    fd = os.open(folder / "a", os.O_RDONLY)
    survey = Survey(ME)
    survey.prepare()
    before = survey.read()[fd]
    assert survey.read()[fd] is before
    os.close(fd)
    survey.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda fd, _path: os.lseek(fd, 3, os.SEEK_SET),
        lambda fd, _path: os.write(fd, b"more than there was"),
        lambda fd, _path: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND),
        lambda fd, _path: os.set_inheritable(fd, True),
        lambda fd, _path: fcntl.flock(fd, fcntl.LOCK_EX),
        lambda _fd, path: path.rename(path.with_name("renamed to a longer name")),
        lambda _fd, path: path.unlink(),
        lambda _fd, path: path.with_name("b").rename(path),
        lambda fd, path: os.dup2(os.open(path.with_name("b"), os.O_RDONLY), fd),
        lambda fd, path: os.dup2(os.open(path, os.O_RDWR), fd),
        lambda _fd, path: (path.unlink(), path.write_bytes(b"another of this name")),
        lambda _fd, path: path.parent.rename(f"{path.parent} elsewhere"),
        lambda fd, path: os.dup2(os.open(path.parent, os.O_RDONLY), fd),
        lambda fd, _path: os.dup2(os.pipe()[0], fd),
        lambda fd, _path: os.dup2(os.memfd_create("memory"), fd),
    ],
)
def test_each_change_is_seen(prepared, folder, change):
    fd = os.open(folder / "a", os.O_RDWR)
    survey = prepared()
    change(fd, folder / "a")
    read(survey, fd)
    os.close(fd)


def test_closed_and_opened(prepared, folder):
    stays, goes = (os.open(folder / "a", os.O_RDONLY) for _ in range(2))
    survey = prepared()
    os.close(goes)
    assert goes not in survey.read()
    comes = [os.open(folder / "b", os.O_RDONLY) for _ in range(3)]
    found = survey.read()
    assert list(found) == sorted(found)
    for fd in (stays, *comes):
        read(survey, fd)
        os.close(fd)


def test_texts_that_do_not_fit_are_read_whole(prepared, folder):
    deep = folder
    while len(str(deep)) <= module._LINK_BYTES:
        deep /= "x" * 100
    deep.mkdir(parents=True)
    fd = os.open(deep, os.O_RDONLY)
    survey = prepared()
    assert read(survey, fd).link == str(deep)
    deep.rename(deep.with_name("y" * 100))
    assert read(survey, fd).link.endswith("y")
    os.close(fd)


def test_the_limit_of_open_files_is_ours_again():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd"))
    low = n_open + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
    try:
        survey = Survey(ME)
        survey.prepare()
        assert len(os.listdir("/proc/self/fd")) > 2 * n_open
        survey.close()
        assert len(os.listdir("/proc/self/fd")) == n_open
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (low, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class TestSharing:
    """Which descriptors are one description, found while running and confirmed later."""

    def parts(self, table, fds):
        return {file.fds for file in table.files if set(file.fds) & set(fds)}

    def truth(self, fds):
        """Return the same by asking about each pair."""
        return {
            tuple(b for b in fds if kcmp(ME, ME, KcmpType.FILE, a, b) is Ordering.EQUAL)
            for a in fds
        }

    @pytest.fixture
    def fds(self, folder):
        opened = [os.open(folder / "a", os.O_RDONLY) for _ in range(6)]
        opened += [os.dup(opened[0]), os.dup(opened[3]), os.dup(opened[3])]
        yield opened
        for fd in opened:
            os.close(fd)

    @pytest.fixture
    def tree(self):
        tree = Tree((ME,))
        yield tree
        tree.forget()

    def test_nothing_changed(self, tree, fds):
        looked = FdTables([ME], running=True, tree=tree)
        looked.note_found(looked.files)
        assert self.parts(looked, fds) == self.truth(fds)
        assert self.parts(FdTables([ME], looked, tree=tree), fds) == self.truth(fds)

    def test_one_became_a_duplicate_and_one_stopped_being_one(self, tree, fds, folder):
        looked = FdTables([ME], running=True, tree=tree)
        looked.note_found(looked.files)
        os.dup2(fds[1], fds[2])
        again = os.open(folder / "a", os.O_RDONLY)
        os.dup2(again, fds[6])
        os.close(again)
        table = FdTables([ME], looked, tree=tree)
        assert self.parts(table, fds) == self.truth(fds)
        assert (fds[1], fds[2]) in self.parts(table, fds)

    def test_an_offset_moved(self, tree, fds):
        looked = FdTables([ME], running=True, tree=tree)
        looked.note_found(looked.files)
        os.lseek(fds[3], 5, os.SEEK_SET)
        table = FdTables([ME], looked, tree=tree)
        assert self.parts(table, fds) == self.truth(fds)
        moved = {fd for file in table.files if file.info.pos == 5 for fd in file.fds}
        assert moved & set(fds) == {fds[3], fds[7], fds[8]}
        assert not any(table.is_unchanged(file) for file in table.files if file.fd == fds[3])


@pytest.mark.parametrize("is_prepared", [True, False])
def test_a_process_that_has_ended_in_between_is_gone(is_prepared):
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        made = Survey(Pid(pid))
        if is_prepared:
            made.prepare()
            made.read()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with contextlib.closing(made), pytest.raises(TargetGone):
        made.read()
