"""Small rules of the kinds that need no kernel."""

import os

import pytest

from ckpt.kernel.arch import NR
from ckpt.process.remote import Reply
from ckpt.resources.base import RestoreOptions
from ckpt.resources.file_identity import FileIdentity
from ckpt.resources.files.eventfd import plan_probe, read_probe
from ckpt.resources.files.open_file import (
    is_made_by_the_kernel,
    is_of_a_process,
    may_read,
    may_write,
)
from ckpt.resources.files.regular import RegularRecord, check_files

EAGAIN = 11


class Counter:
    """An eventfd as eventfd(2) describes it; never blocks."""

    def __init__(self, count, *, semaphore):
        self.count, self.semaphore = count, semaphore

    def run(self, asked):
        if asked.nr is NR.write:
            self.count += int.from_bytes(asked.args[1].data, "little")
        elif not self.count:
            return Reply(asked, -EAGAIN)
        else:
            self.count -= 1 if self.semaphore else self.count
        return Reply(asked, 8)


@pytest.mark.parametrize("semaphore", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_the_probe_of_an_eventfd_is_right_and_undone(count, semaphore):
    counter = Counter(count, semaphore=semaphore)
    replies = [counter.run(asked) for asked in plan_probe(5, count)]
    assert read_probe(replies) is semaphore
    assert counter.count == count


def test_access_modes():
    assert (may_read(os.O_RDONLY), may_write(os.O_RDONLY)) == (True, False)
    assert (may_read(os.O_WRONLY), may_write(os.O_WRONLY)) == (False, True)
    assert (may_read(os.O_RDWR | os.O_APPEND), may_write(os.O_RDWR)) == (True, True)
    assert (may_read(os.O_PATH), may_write(os.O_PATH)) == (False, False)


def test_which_paths_are_another_file_after_a_restore():
    assert is_of_a_process("/proc/12/maps")
    assert not is_of_a_process("/proc/meminfo")
    assert is_made_by_the_kernel("/proc/meminfo")
    assert is_made_by_the_kernel("/sys/fs/cgroup/x")
    assert not is_made_by_the_kernel("/system/x")


def record_of(path, *, offset=0, written=True, size=None):
    status = os.stat(path)
    identity = FileIdentity(str(path), status.st_size if size is None else size, status.st_mtime_ns)
    return RegularRecord(identity, offset, written=written, by_name=False)


@pytest.mark.parametrize(
    ("size_then", "offset", "accepted"),
    [
        (100, 0, True),  # unchanged
        (90, 90, True),  # grown
        (200, 0, True),  # shrunk, no byte of it in use
        (200, 100, True),  # shrunk to the very offset
        (200, 101, False),  # below it
        (100, 500, True),  # the offset was beyond the end already
        (90, 500, True),
        (200, 500, False),
    ],
)
def test_the_size_of_a_file_that_is_written(tmp_path, size_then, offset, accepted):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    said = []
    options = RestoreOptions(warn=said.append)
    problems = list(check_files(record_of(path, offset=offset, size=size_then), os.O_RDWR, options))
    assert (problems == []) is accepted
    assert bool(said) is (accepted and size_then != 100)


def test_a_file_that_is_only_read_may_not_grow(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    record = record_of(path, written=False, size=90)
    (problem,) = check_files(record, os.O_RDONLY, RestoreOptions())
    assert problem.text == "has 100 bytes now, had 90"
    allowed = RestoreOptions(allow_changed=frozenset({str(path)}))
    assert list(check_files(record, os.O_RDONLY, allowed)) == []
