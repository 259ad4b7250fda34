"""Event counters, and how an older kernel is asked whether one is a semaphore."""

import os
import resource

import pytest

from ckpt.kernel import ptrace
from ckpt.kernel.procfs.fdinfo import read_fdinfo
from ckpt.process.arena import arena
from ckpt.process.freezer import freeze
from ckpt.resources.files.eventfd import plan_probe, read_probe
from integration.files.processes import brought_back, capture, opened_by, rebuilt

HUGE = 2**64 - 2


def number(data):
    return int.from_bytes(data, "little")


@pytest.mark.parametrize("count", [0, 1, 7, 2**32 + 5, HUGE])
def test_a_counter_comes_back(count):
    def prepare():
        os.eventfd_write(os.eventfd(0, os.EFD_NONBLOCK), count)
        os.eventfd(3, 0)

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        if count:
            assert number(built.read(3, 8)) == count
        with pytest.raises(BlockingIOError):
            built.read(3, 8)


def test_a_semaphore_comes_back():
    def prepare():
        os.eventfd(2, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)

    with brought_back(prepare) as (record, built):
        assert record.descriptions[-1].record.semaphore
        assert [number(built.read(3, 8)), number(built.read(3, 8))] == [1, 1]
        with pytest.raises(BlockingIOError):
            built.read(3, 8)


@pytest.mark.parametrize("mode", [0, os.EFD_SEMAPHORE], ids=["counter", "semaphore"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 256])
def test_the_probe_tells_a_semaphore_and_leaves_the_count(mode, count):
    def prepare():
        os.eventfd(count, mode)

    with (
        opened_by(prepare) as pid,
        freeze(pid, ptrace.Option.NONE) as frozen,
        arena(pid, frozen.tgid, frozen.leader) as lent,
    ):
        replies = lent.run(frozen.leader, plan_probe(3, count))
        assert read_probe(replies) is bool(mode)
        info = read_fdinfo(pid, 3)
    assert info.eventfd.count == count


def test_more_descriptors_than_our_own_soft_limit():
    def prepare():
        for number in range(400):
            os.eventfd(number)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened_by(prepare) as pid:
        record = capture(pid)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        with rebuilt(record, pid) as built:
            assert built.capture() == record
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
