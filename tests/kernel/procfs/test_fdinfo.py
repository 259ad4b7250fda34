import fcntl
import os
import select

import pytest

from ckpt.errors import TargetGone
from ckpt.kernel.procfs.fdinfo import (
    EpollTarget,
    EventFd,
    FdInfo,
    FileLock,
    InotifyWatch,
    PidFd,
    TimerFd,
    parse_fdinfo,
    read_fdinfo,
)
from ckpt.kernel.procfs.files import list_fds, list_pids, read_link
from tests.kernel.procfs.captured import text

ME = os.getpid()


def captured(kind):
    return parse_fdinfo(text(f"fdinfo_{kind}"))


def test_a_regular_file():
    info = captured("regular")
    assert info == FdInfo(pos=17, flags=0o2100000, mnt_id=27, inode=info.inode)
    assert info.inode > 0
    assert info.close_on_exec


def test_flags_are_octal():
    assert captured("path").flags == os.O_PATH | os.O_CLOEXEC


def test_eventfd():
    info = captured("eventfd")
    assert info.eventfd == EventFd(count=0xABC, eventfd_id=info.eventfd.eventfd_id, semaphore=True)
    old = parse_fdinfo("pos:\t0\nflags:\t02\nmnt_id:\t9\neventfd-count:               1f\n")
    assert old.eventfd == EventFd(count=0x1F, eventfd_id=None, semaphore=None)
    assert old.inode is None


def test_epoll():
    first, second = captured("epoll").epoll_targets
    # Python sets only the lower half of the data word.
    assert (first.data & 0xFFFFFFFF, second.data & 0xFFFFFFFF) == (3, 5)
    assert first == EpollTarget(3, 0x80000019, first.data, 0, first.inode, (0, 0x10))
    assert (second.tfd, second.events) == (5, 0x19)
    full = "tfd:       12 events:       1d data: fedcba9876543210  pos:-1 ino:bae2 sdev:800001"
    target = EpollTarget(12, 0x1D, 0xFEDCBA9876543210, -1, 0xBAE2, (8, 1))
    common = "pos:\t0\nflags:\t02\nmnt_id:\t17\n"
    assert parse_fdinfo(f"{common}{full}\n").epoll_targets == (target,)


def test_signalfd():
    assert captured("signalfd").signalfd_mask == 1 << 9 | 1


def test_timerfd():
    info = captured("timerfd").timerfd
    assert info == TimerFd(1, 0, 0, info.left_ns, 3_000_000_500)
    assert 99_000_000_000 < info.left_ns < 100_000_000_007


def test_inotify():
    proc, tmp = captured("inotify").inotify_watches
    assert tmp == InotifyWatch(1, tmp.inode, (0xFE, 0), 0xFFF, 1, tmp.handle)
    assert len(tmp.handle) == 8
    assert (proc.wd, proc.mask, proc.dev) == (2, 3, (0, 0x15))
    line = "inotify wd:a ino:ff sdev:800003 mask:2 ignored_mask:0 \n"
    bare = parse_fdinfo(f"pos:\t0\nflags:\t02\nmnt_id:\t9\n{line}")
    assert bare.inotify_watches == (InotifyWatch(10, 255, (8, 3), 2, None, None),)


def test_locks():
    info = captured("locks")
    flock, posix, ofd = info.locks
    dev, pid = (0xFE, 0), flock.pid
    assert flock == FileLock("FLOCK", "ADVISORY", "WRITE", pid, dev, info.inode, 0, None)
    assert posix == FileLock("POSIX", "ADVISORY", "WRITE", pid, dev, info.inode, 10, 109)
    assert ofd == FileLock("OFDLCK", "ADVISORY", "WRITE", -1, dev, info.inode, 200, 249)
    (lease,) = captured("lease").locks
    assert (lease.kind, lease.state, lease.mode) == ("LEASE", "ACTIVE", "READ")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("pty", "tty-index"),
        ("userfaultfd", "API"),
        ("io_uring", "SqMask"),
        ("io_uring", "PollList"),
    ],
)
def test_lines_of_other_kinds_are_kept(kind, key):
    info = captured(kind)
    assert info.other_value(key) is not None
    assert info.other_value("no such line") is None


def test_lines_without_a_value_are_kept_whole():
    (first, *_) = captured("fanotify").other
    assert first == ("fanotify flags", "0 event-flags:8000")
    assert parse_fdinfo("pos:\t0\nflags:\t0\nmnt_id:\t1\nnew kind\n").other == (("new kind", ""),)


@pytest.mark.parametrize("missing", ["pos", "flags", "mnt_id"])
def test_the_common_lines_must_be_there(missing):
    with pytest.raises(ValueError, match=missing):
        parse_fdinfo(text("fdinfo_regular").replace(missing, "renamed"))


def test_a_malformed_lock_is_refused():
    with pytest.raises(ValueError, match="not a lock"):
        parse_fdinfo("pos:\t0\nflags:\t0\nmnt_id:\t1\nlock:\t1: FLOCK\n")


@pytest.fixture
def pipe():
    ends = os.pipe2(os.O_CLOEXEC)
    yield ends
    for end in ends:
        os.close(end)


def test_our_own_pipe(pipe):
    read_end, write_end = pipe
    assert {read_end, write_end} <= set(list_fds(ME))
    info = read_fdinfo(ME, write_end)
    assert info.flags == os.O_WRONLY | os.O_CLOEXEC
    os.set_inheritable(write_end, True)
    assert not read_fdinfo(ME, write_end).close_on_exec
    assert read_link(ME, f"fd/{read_end}") == f"pipe:[{os.fstat(read_end).st_ino}]"
    assert info.inode in (None, os.fstat(read_end).st_ino)


def test_our_own_epoll(pipe):
    with select.epoll() as epoll:
        epoll.register(pipe[0], select.EPOLLIN | select.EPOLLONESHOT)
        (target,) = read_fdinfo(ME, epoll.fileno()).epoll_targets
        assert (target.tfd, target.inode) == (pipe[0], os.fstat(pipe[0]).st_ino)
        assert target.events & ~0x18 == select.EPOLLIN | select.EPOLLONESHOT
        assert target.data & 0xFFFFFFFF == pipe[0]


def test_our_own_locks(tmp_path):
    with open(tmp_path / "file", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        fcntl.lockf(file, fcntl.LOCK_EX, 5, 3)
        info = read_fdinfo(ME, file.fileno())
        assert [(lock.kind, lock.mode, lock.start, lock.end) for lock in info.locks] == [
            ("FLOCK", "READ", 0, None),
            ("POSIX", "WRITE", 3, 7),
        ]
        assert {lock.inode for lock in info.locks} == {os.fstat(file.fileno()).st_ino}


def test_offset_and_mode_of_our_own_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    with open(path, "ab", buffering=0) as file:
        file.write(b"y")
        info = read_fdinfo(ME, file.fileno())
        assert info.pos == 101
        assert info.flags & os.O_APPEND


def test_a_closed_descriptor_is_none_and_an_ended_process_is_gone():
    assert read_fdinfo(ME, 0x7FFFFFFF) is None
    with pytest.raises(TargetGone):
        read_fdinfo(0x7FFFFFFF, 0)
    with pytest.raises(TargetGone):
        list_fds(0x7FFFFFFF)
    with pytest.raises(TargetGone):
        read_link(0x7FFFFFFF, "exe")


def test_we_are_among_all_processes():
    pids = list_pids()
    assert {1, ME, os.getppid()} <= set(pids)
    assert pids == sorted(pids)


def test_pidfd():
    common = "pos:\t0\nflags:\t02000002\nmnt_id:\t4\nino:\t630016\n"
    assert parse_fdinfo(f"{common}Pid:\t23599\nNSpid:\t23599\t7\n").pidfd == PidFd(
        23599, (23599, 7)
    )
    assert parse_fdinfo(f"{common}Pid:\t-1\nNSpid:\t-1\n").pidfd == PidFd(-1, ())
    assert parse_fdinfo(f"{common}Pid:\t0\n").pidfd == PidFd(0, ())
    assert parse_fdinfo(common).pidfd is None
