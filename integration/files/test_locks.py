"""Locks on files: those of fcntl and of flock come back, and exclude others as before."""

import contextlib
import fcntl
import os
import signal
import struct

import pytest

from ckpt.errors import RestoreFailed
from ckpt.kernel.arch import NR
from ckpt.kernel.procfs.status import read_status
from ckpt.process.remote import In, call
from ckpt.resources.files.owners import FILE_OWNERS
from integration.files.processes import brought_back, capture, look, opened_by, rebuilt

_FLOCK = struct.Struct("<hh4xqqi4x")
_OFD_SETLK = 37


@pytest.fixture
def path(tmp_path):
    """A file of a hundred bytes."""
    file = tmp_path / "locked"
    file.write_bytes(bytes(100))
    return str(file)


def lock_bytes(fd, start, length, kind=fcntl.F_WRLCK, command=_OFD_SETLK):
    fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


@contextlib.contextmanager
def opened(path, flags=os.O_RDWR):
    """A description of our own: its OFD locks meet those of everybody else."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def is_refused(path, start, length, kind=fcntl.F_WRLCK):
    with opened(path) as fd:
        try:
            lock_bytes(fd, start, length, kind)
        except BlockingIOError:
            return True
    return False


def lock_lines(pid, fd):
    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
        return sorted(line.split(": ", 1)[1] for line in file if line.startswith("lock:"))


def test_bytes_locked_for_the_process_are_locked_again(path):
    def prepare():
        fd = os.open(path, os.O_RDWR)
        lock_bytes(fd, 10, 20, command=fcntl.F_SETLK)
        lock_bytes(fd, 40, 10, fcntl.F_RDLCK, fcntl.F_SETLK)
        lock_bytes(fd, 90, 0, command=fcntl.F_SETLK)

    def nothing_is_locked():
        assert not is_refused(path, 0, 0)

    with opened_by(prepare) as pid:
        before = lock_lines(pid, 3)
        record = capture(pid)
    nothing_is_locked()
    with rebuilt(record, pid) as built:
        assert lock_lines(built.pid, 3) == before
        refused = [at for at in range(0, 120, 10) if is_refused(path, at, 10)]
        assert refused == [10, 20, 40, 90, 100, 110]
        assert not is_refused(path, 40, 10, fcntl.F_RDLCK)


def test_a_lock_of_sqlites_kind_far_behind_the_end_is_locked_again(path):
    pending = 0x4000_0000

    def prepare():
        fd = os.open(path, os.O_RDWR)
        lock_bytes(fd, pending + 1, 1, command=fcntl.F_SETLK)
        lock_bytes(fd, pending + 2, 510, fcntl.F_RDLCK, fcntl.F_SETLK)

    with brought_back(prepare):
        assert is_refused(path, pending + 1, 1, fcntl.F_RDLCK)
        assert is_refused(path, pending + 2, 1)
        assert not is_refused(path, pending + 2, 510, fcntl.F_RDLCK)
        assert not is_refused(path, pending, 1)


def test_a_lock_of_a_description_belongs_to_that_description_again(path):
    def prepare():
        holder = os.open(path, os.O_RDWR)
        lock_bytes(holder, 0, 50)
        os.dup(holder)
        os.open(path, os.O_RDWR)

    with opened_by(prepare) as pid:
        before = lock_lines(pid, 3)
        record = capture(pid)
    with rebuilt(record, pid) as built:
        assert lock_lines(built.pid, 3) == lock_lines(built.pid, 4) == before
        assert lock_lines(built.pid, 5) == []
        assert is_refused(path, 49, 1)
        assert not is_refused(path, 50, 1)


@pytest.mark.parametrize("operation", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_flock_is_taken_again(path, operation):
    with (
        brought_back(lambda: fcntl.flock(os.open(path, os.O_RDONLY), operation)),
        opened(path) as fd,
    ):
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if operation == fcntl.LOCK_SH:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_directory_can_be_locked(tmp_path):
    def prepare():
        fcntl.flock(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX)

    with (
        brought_back(prepare),
        opened(tmp_path, os.O_RDONLY) as fd,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_locks_of_several_descriptions_of_one_file_come_back(path):
    """Any close of the file would drop the locks of the process: they are taken after the last."""

    def prepare():
        for at in range(5):
            lock_bytes(os.open(path, os.O_RDWR), 10 * at, 10, command=fcntl.F_SETLK)

    with opened_by(prepare) as pid:
        before = [lock_lines(pid, fd) for fd in range(3, 8)]
        record = capture(pid)
    with rebuilt(record, pid) as built:
        after = [lock_lines(built.pid, fd) for fd in range(3, 8)]
        # The kernel joins neighbours under the description that asked last.
        assert after == before
        assert is_refused(path, 0, 1)
        assert is_refused(path, 49, 1)
        assert not is_refused(path, 50, 1)


@pytest.mark.parametrize("command", [fcntl.F_SETLK, _OFD_SETLK])
def test_a_lock_that_another_process_holds_now_fails_the_restore(path, command):
    def take():
        lock_bytes(os.open(path, os.O_RDWR), 0, 50, command=command)

    with opened_by(take) as pid:
        record = capture(pid)
    with (
        opened_by(
            lambda: lock_bytes(os.open(path, os.O_RDWR), 49, 1, command=fcntl.F_SETLK)
        ) as holder,
        pytest.raises(RestoreFailed) as failed,
        rebuilt(record, pid),
    ):
        pass
    assert failed.value.step == f"locking {path}"
    assert failed.value.reason.startswith(f"process {holder} holds a lock on it")
    assert not os.path.exists(f"/proc/{pid}")


def test_a_description_that_holds_flock_now_fails_the_restore(path):
    with opened_by(lambda: fcntl.flock(os.open(path, os.O_RDWR), fcntl.LOCK_EX)) as pid:
        record = capture(pid)
    with opened(path) as ours:
        fcntl.flock(ours, fcntl.LOCK_SH)
        with pytest.raises(RestoreFailed) as failed, rebuilt(record, pid):
            pass
    assert failed.value.reason.startswith("another process holds a lock on it")


def test_a_lock_of_a_stream_that_is_another_file_now_is_left_out(path, tmp_path):
    other = str(tmp_path / "other")
    with opened_by(lambda: fcntl.flock(os.open(path, os.O_RDWR), fcntl.LOCK_EX)) as pid:
        record = capture(pid)
    with rebuilt(record, pid, inherit={3: other}) as built, opened(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert built.warnings == ["fd 3 is another file now, on which nothing is locked"]
        assert lock_lines(built.pid, 3) == []


@pytest.mark.parametrize(
    ("flags", "kind"), [(os.O_RDWR, fcntl.F_WRLCK), (os.O_RDONLY, fcntl.F_RDLCK)]
)
def test_a_lease_is_taken_again_and_its_owner_hears_of_an_opening(path, flags, kind):
    def prepare():
        signal.pthread_sigmask(signal.SIG_BLOCK, {_SIGNAL})
        fd = os.open(path, flags)
        fcntl.fcntl(fd, fcntl.F_SETSIG, _SIGNAL)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)

    with opened_by(prepare) as pid:
        before = lock_lines(pid, 3)
        record, owners = capture(pid), capture(pid, FILE_OWNERS)
    assert [(one.fd, one.pid, one.signal) for one in owners.owners] == [(3, pid, _SIGNAL)]
    with rebuilt(record, pid) as built:
        assert lock_lines(built.pid, 3) == before
        built.restore(FILE_OWNERS, owners)
        assert built.capture(FILE_OWNERS) == owners
        built.run([call(NR.rt_sigprocmask, signal.SIG_BLOCK, In(_MASK), 0, len(_MASK))])
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_RDWR | os.O_NONBLOCK)
        assert read_status(pid).shared_pending >> (_SIGNAL - 1) & 1


_SIGNAL = int(signal.SIGRTMIN) + 4
_MASK = (1 << (_SIGNAL - 1)).to_bytes(8, "little")


def test_a_lease_on_a_file_that_is_open_elsewhere_now_fails_the_restore(path):
    def prepare():
        fcntl.fcntl(os.open(path, os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)

    with opened_by(prepare) as pid:
        record = capture(pid)
    with opened(path), pytest.raises(RestoreFailed) as failed, rebuilt(record, pid):
        pass
    assert failed.value.reason.startswith("another process has it open, so no lease on it is given")


def test_a_lease_that_is_being_broken_is_refused(path):
    def prepare():
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fcntl.fcntl(os.open(path, os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)

    with opened_by(prepare) as pid:
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        (found,) = look(pid)
    assert found.split("): ")[1] == (
        "holds a lease that is being broken on the file, which is not supported"
    )
