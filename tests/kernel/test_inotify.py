"""Our own instances and watches, and handles of inodes that survive a rename."""

import os

import pytest

from ckpt.kernel import inotify
from ckpt.kernel.handles import open_by_handle_at
from tests.kernel.c_headers import read_numbers


def test_numbers_are_those_of_the_header():
    ours = {name: value for name, value in vars(inotify).items() if name.startswith("IN_")}
    theirs = read_numbers(["linux/inotify.h"], ours)
    # What an older header does not know is not looked at.
    assert {*ours} - {*theirs} <= {"IN_MASK_CREATE", "IN_CLOEXEC", "IN_NONBLOCK"}
    assert {name: value & 0xFFFF_FFFF for name, value in theirs.items()} == {
        name: ours[name] for name in theirs
    }


def test_watches_are_numbered_upwards(tmp_path):
    fd = inotify.inotify_init()
    try:
        assert inotify.inotify_add_watch(fd, str(tmp_path), inotify.IN_ATTRIB) == 1
        inotify.inotify_rm_watch(fd, 1)
        assert inotify.inotify_add_watch(fd, str(tmp_path), inotify.IN_ATTRIB) == 2
        assert inotify.count_unread_bytes(fd) == inotify.EVENT_HEADER.size
        mask = inotify.IN_ATTRIB | inotify.IN_MASK_CREATE
        with pytest.raises(FileExistsError):
            inotify.inotify_add_watch(fd, str(tmp_path), mask)
    finally:
        os.close(fd)
    assert inotify.read_max_queued_events() > 0


def test_a_handle_of_nothing_is_an_error():
    fd = os.open("/", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=r"."):
            open_by_handle_at(fd, 1, b"\xff" * 8, os.O_PATH)
    finally:
        os.close(fd)
