import os
import select

import pytest

from ckpt.errors import TargetGone
from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp, kcmp_epoll_slot, kcmp_epoll_target
from tests.kernel.children import ended, running

ME = os.getpid()


@pytest.fixture(autouse=True)
def needs_kcmp(features):
    if not features.kcmp:
        pytest.skip("this kernel has no kcmp")


@pytest.fixture
def fds():
    first, other = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)
    copy = os.dup(first)
    yield first, copy, other
    for fd in (first, copy, other):
        os.close(fd)


def test_duplicates_are_one_description(fds):
    first, copy, other = fds
    assert kcmp(ME, ME, KcmpType.FILE, first, copy) is Ordering.EQUAL
    assert kcmp(ME, ME, KcmpType.FILE, first, other) is not Ordering.EQUAL


def test_the_order_is_one(fds):
    first, _, other = fds
    orders = {
        kcmp(ME, ME, KcmpType.FILE, first, other),
        kcmp(ME, ME, KcmpType.FILE, other, first),
    }
    assert orders == {Ordering.LESS, Ordering.GREATER}


def test_across_processes():
    with running("say('ready'); wait()") as child:
        child.heard()
        # Its standard error is ours.
        assert kcmp(ME, child.pid, KcmpType.FILE, 2, 2) is Ordering.EQUAL
        assert kcmp(ME, child.pid, KcmpType.FILE, 2, 0) is not Ordering.EQUAL
        assert kcmp(ME, child.pid, KcmpType.VM) is not Ordering.EQUAL
        assert kcmp(child.pid, child.pid, KcmpType.FILES) is Ordering.EQUAL


def test_the_target_of_an_epoll(fds):
    read_end, write_end = os.pipe()
    try:
        with select.epoll() as epoll:
            epoll.register(read_end)
            slot = kcmp_epoll_slot(efd=epoll.fileno(), tfd=read_end, toff=0)
            assert kcmp_epoll_target(ME, read_end, ME, slot) is Ordering.EQUAL
            assert kcmp_epoll_target(ME, write_end, ME, slot) is not Ordering.EQUAL
            missing = kcmp_epoll_slot(efd=epoll.fileno(), tfd=fds[0], toff=0)
            with pytest.raises(FileNotFoundError):
                kcmp_epoll_target(ME, read_end, ME, missing)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_errors():
    with pytest.raises(OSError, match="Bad file descriptor"):
        kcmp(ME, ME, KcmpType.FILE, 0x7FFFFFFF, 0)
    with ended() as pid:
        pass
    with pytest.raises(TargetGone):
        kcmp(pid, ME, KcmpType.VM)
