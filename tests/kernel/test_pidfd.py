import os
import select
import signal

import pytest

from ckpt.errors import NotPermitted, TargetGone
from ckpt.kernel.pidfd import PIDFD_NONBLOCK, pidfd_getfd, pidfd_open, pidfd_send_signal
from ckpt.kernel.procfs.fdinfo import read_fdinfo
from tests.kernel.children import ended, running

WAITING = """
    say("ready")
    wait()
"""


@pytest.fixture
def opened():
    fds = []
    yield lambda fd: fds.append(fd) or fd
    for fd in fds:
        os.close(fd)


def test_readable_once_the_process_has_ended(opened):
    with running(WAITING) as child:
        child.heard()
        pidfd = opened(pidfd_open(child.pid))
        assert not os.get_inheritable(pidfd)
        assert select.select([pidfd], [], [], 0)[0] == []
        pidfd_send_signal(pidfd, signal.SIGKILL, pid=child.pid)
        assert select.select([pidfd], [], [])[0] == [pidfd]


def test_a_process_that_was_waited_for_is_gone(opened):
    with ended() as pid:
        pidfd = opened(pidfd_open(pid))
    with pytest.raises(TargetGone) as caught:
        pidfd_send_signal(pidfd, 0, pid=pid)
    assert caught.value.pid == pid
    with pytest.raises(TargetGone):
        pidfd_open(pid)
    with pytest.raises(TargetGone):
        pidfd_getfd(pidfd, 0, pid=pid)


def test_flags_reach_the_kernel(opened):
    pidfd = opened(pidfd_open(os.getpid(), PIDFD_NONBLOCK))
    assert not os.get_blocking(pidfd)


def test_a_descriptor_of_another_process_shares_the_offset(opened, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    code = f"""
        fd = os.open({str(path)!r}, os.O_RDONLY)
        say(fd)
        wait()
        say(os.lseek(fd, 0, os.SEEK_CUR))
        wait()
    """
    with running(code) as child:
        (remote,) = child.heard()
        pidfd = opened(pidfd_open(child.pid))
        fd = opened(pidfd_getfd(pidfd, remote, pid=child.pid))
        assert os.read(fd, 4) == b"0123"
        assert read_fdinfo(os.getpid(), fd).close_on_exec
        child.tell()
        assert child.heard() == [4]


def test_a_descriptor_that_is_not_open_there(opened):
    pidfd = opened(pidfd_open(os.getpid()))
    with pytest.raises(OSError, match="Bad file descriptor"):
        pidfd_getfd(pidfd, 0x7FFFFFFF, pid=os.getpid())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_stranger_may_not(opened):
    with running(WAITING) as child:
        child.heard()
        pidfd = opened(pidfd_open(child.pid))
        stranger = os.fork()
        if stranger == 0:
            os.setresuid(65534, 65534, 65534)
            try:
                pidfd_send_signal(pidfd, 0, pid=child.pid)
            except NotPermitted:
                os._exit(17)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(stranger, 0)[1]) == 17
