"""inotify: what is watched, under which numbers, and what of its events nobody has read."""

import os
import struct
from pathlib import Path

import attrs
import pytest

from ckpt.errors import RestoreFailed
from ckpt.kernel.inotify import (
    IN_ATTRIB,
    IN_DONT_FOLLOW,
    IN_EXCL_UNLINK,
    IN_MODIFY,
    IN_ONESHOT,
    IN_Q_OVERFLOW,
    count_unread_bytes,
    inotify_add_watch,
    inotify_init,
    inotify_rm_watch,
)
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.resources.base import RestoreOptions
from ckpt.resources.files.table import FILES
from integration.files.processes import brought_back, capture, encoded, look, opened_by, rebuilt

IN_CREATE, IN_OPEN = 0x100, 0x20
ROOM = 4096


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    return tmp_path


def instance():
    """Make one that does not block."""
    fd = inotify_init()
    os.set_blocking(fd, False)
    return fd


def events(built, fd=3):
    raw, found = built.read(fd, ROOM), []
    while raw:
        watch, mask, _, length = struct.unpack_from("<iIII", raw)
        name = raw[16 : 16 + length].rstrip(b"\0").decode()
        found.append((watch, mask, name))
        raw = raw[16 + length :]
    return found


def watches(record):
    (one,) = (d.record for d in record.descriptions if d.kind == "inotify")
    return [(watch.watch, watch.mask, watch.path) for watch in one.watches]


def test_watches_come_back_under_their_numbers(folder):
    def prepare():
        fd = instance()
        inotify_add_watch(fd, f"{folder}/a", IN_CREATE)
        for number in (2, 3, 4):
            assert inotify_add_watch(fd, f"{folder}/c", IN_OPEN) == number
            inotify_rm_watch(fd, number)
        assert inotify_add_watch(fd, f"{folder}/b", IN_CREATE | IN_EXCL_UNLINK) == 5
        assert inotify_add_watch(fd, f"{folder}/file", IN_MODIFY | IN_ONESHOT) == 6
        assert inotify_add_watch(fd, f"{folder}/link", IN_ATTRIB | IN_DONT_FOLLOW) == 7
        os.read(fd, ROOM)

    with brought_back(prepare) as (record, built):
        assert watches(record) == [
            (1, IN_CREATE, f"{folder}/a"),
            (5, IN_CREATE | IN_EXCL_UNLINK, f"{folder}/b"),
            (6, IN_MODIFY | IN_ONESHOT, f"{folder}/file"),
            (7, IN_ATTRIB, f"{folder}/link"),
        ]
        assert built.capture() == record
        with pytest.raises(BlockingIOError):
            built.read(3, ROOM)
        (folder / "a" / "new").touch()
        (folder / "b" / "other").touch()
        (folder / "file").write_text("y")
        os.utime(folder / "link", follow_symlinks=False)
        seen = events(built)
        assert seen[:2] == [(1, IN_CREATE, "new"), (5, IN_CREATE, "other")]
        assert (6, IN_MODIFY, "") in seen
        assert (7, IN_ATTRIB, "") in seen
        assert built.warnings == []


def test_a_watch_of_a_high_number(folder):
    high = 20_000

    def prepare():
        fd = instance()
        for number in range(1, high):
            inotify_add_watch(fd, f"{folder}/c", IN_OPEN)
            inotify_rm_watch(fd, number)
            if number % 100 == 0:
                os.read(fd, ROOM)
        os.read(fd, ROOM)
        assert inotify_add_watch(fd, f"{folder}/a", IN_CREATE) == high

    with brought_back(prepare) as (record, built):
        assert watches(record) == [(high, IN_CREATE, f"{folder}/a")]
        assert built.capture() == record
        assert built.warnings == []


def test_events_that_were_not_read_become_one_overflow(folder):
    def prepare():
        fd = instance()
        inotify_add_watch(fd, f"{folder}/a", IN_CREATE)
        (folder / "a" / "unread").touch()

    with brought_back(prepare) as (record, built):
        assert record.descriptions[1].record.unread_bytes == 32
        assert len(built.warnings) == 1
        assert "fd 3: 32 bytes of inotify events had not been read" in built.warnings[0]
        (folder / "a" / "later").touch()
        assert events(built) == [(-1, IN_Q_OVERFLOW, ""), (1, IN_CREATE, "later")]
        with pytest.raises(BlockingIOError):
            built.read(3, ROOM)


def test_the_dump_takes_no_event_away(folder):
    def prepare():
        fd = instance()
        inotify_add_watch(fd, f"{folder}/a", IN_CREATE)
        (folder / "a" / "unread").touch()

    with opened_by(prepare) as pid:
        capture(pid)
        pidfd = pidfd_open(pid)
        fd = pidfd_getfd(pidfd, 3, pid=pid)
        try:
            assert count_unread_bytes(fd) == 32
            assert os.read(fd, ROOM)[16:].rstrip(b"\0") == b"unread"
        finally:
            os.close(fd)
            os.close(pidfd)


def test_files_that_were_renamed_are_found(folder):
    def prepare():
        fd = instance()
        inotify_add_watch(fd, f"{folder}/a", IN_CREATE)
        inotify_add_watch(fd, f"{folder}/file", IN_MODIFY)

    def rename():
        (folder / "a").rename(folder / "renamed")
        (folder / "file").rename(folder / "b" / "moved file")

    with opened_by(prepare) as pid:
        record = capture(pid, meanwhile=rename)
    with rebuilt(record, pid) as built:
        assert [path for _, _, path in watches(record)] == [
            f"{folder}/renamed",
            f"{folder}/b/moved file",
        ]
        assert watches(built.capture()) == watches(record)


@pytest.mark.parametrize("path", ["/dev/shm", "/sys/kernel/mm", "/proc/sys/kernel", "/"])
def test_what_is_on_other_file_systems_is_found(path):
    def prepare():
        inotify_add_watch(instance(), path, IN_CREATE)

    with opened_by(prepare) as pid:
        (watch,) = watches(capture(pid))
        assert os.path.samefile(watch[2], path)


def test_a_deleted_file_that_is_watched_is_refused(folder):
    def prepare():
        fd = instance()
        inotify_add_watch(fd, f"{folder}/a", IN_CREATE)
        kept = os.open(f"{folder}/a", os.O_RDONLY)
        os.rmdir(f"{folder}/a")
        os.dup2(os.open("/dev/null", os.O_RDONLY), kept)
        held = os.open(f"{folder}/b", os.O_PATH)
        inotify_add_watch(fd, f"{folder}/b", IN_CREATE)
        os.rmdir(f"{folder}/b")
        return held

    with opened_by(prepare) as pid:
        found = [line for line in look(pid) if "inotify" in line]
    assert len(found) == 1
    assert found[0].startswith("fd 3 (anon_inode:inotify): is an inotify that watches inode ")
    assert found[0].endswith("which is deleted or whose name cannot be found")


def test_a_missing_file_is_named_before_anything_starts(folder):
    def prepare():
        inotify_add_watch(instance(), f"{folder}/a", IN_CREATE)

    with opened_by(prepare) as pid:
        record = capture(pid)
    Path(folder, "a").rmdir()
    (finding,) = FILES.check_files(record, RestoreOptions())
    assert f"watched {folder}/a, which cannot be opened" in str(finding)


def test_two_names_of_one_file_fail_the_restore(folder):
    def prepare():
        fd = instance()
        inotify_add_watch(fd, f"{folder}/a", IN_CREATE)
        inotify_add_watch(fd, f"{folder}/b", IN_CREATE)

    with opened_by(prepare) as pid:
        record = capture(pid)
    (folder / "b").rmdir()
    (folder / "b").symlink_to("a")
    with (
        pytest.raises(RestoreFailed, match="leads to the same file now"),
        rebuilt(record, pid),
    ):
        pass


def test_a_blocking_instance_is_not_waited_for(folder):
    def prepare():
        fd = inotify_init()
        inotify_add_watch(fd, f"{folder}/c", IN_OPEN)
        inotify_rm_watch(fd, 1)
        os.read(fd, ROOM)
        inotify_add_watch(fd, f"{folder}/a", IN_CREATE)

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        (folder / "a" / "x").touch()
        assert events(built) == [(2, IN_CREATE, "x")]


def test_a_record_of_no_instance_is_refused():
    def prepare():
        inotify_add_watch(instance(), "/", IN_CREATE)

    with opened_by(prepare) as pid:
        record = capture(pid)
    (one,) = (d for d in record.descriptions if d.kind == "inotify")
    with pytest.raises(ValueError, match="not ascending"):
        attrs.evolve(one.record, watches=one.record.watches * 2)
    with pytest.raises(ValueError, match="no watch 0"):
        attrs.evolve(one.record.watches[0], watch=0)
    assert encoded(record) == record
