import os

import pytest

from ckpt.kernel.procfs.mountinfo import Mount, parse_mountinfo, read_mountinfo

LINES = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
36 27 98:0 /mnt1 /a\\040b rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue
37 27 0:41 /x\\134y /z rw - overlay overlay rw,lowerdir=/l - m
"""


def test_roots_and_paths_are_as_they_are_called():
    assert parse_mountinfo(LINES) == [
        Mount(27, 1, (254, 0), "/", "/", "ext4"),
        Mount(36, 27, (98, 0), "/mnt1", "/a b", "ext3"),
        Mount(37, 27, (0, 41), "/x\\y", "/z", "overlay"),
    ]


def test_what_is_no_line_is_refused():
    with pytest.raises(ValueError, match="not a line of mountinfo"):
        parse_mountinfo("27 1 254:0 / /\n")


def test_our_own():
    mounts = read_mountinfo(os.getpid())
    assert any(mount.path == "/" for mount in mounts)
    assert {mount.path: mount.dev for mount in mounts}["/proc"] == (
        os.major(os.stat("/proc").st_dev),
        os.minor(os.stat("/proc").st_dev),
    )


def test_options_and_who_follows_whom():
    plain, slave, overlay = parse_mountinfo(LINES)
    assert (plain.options, plain.fs_options) == (("rw", "relatime"), ("rw", "discard"))
    assert [one.follows for one in (plain, slave, overlay)] == [False, True, False]
