"""The promise: groups are found wherever their hierarchies are mounted."""

import pytest

from ckpt.kernel.procfs.cgroups import (
    Hierarchy,
    Membership,
    directory_of,
    parse_cgroup,
    parse_hierarchies,
)

BOTH = """\
9:name=systemd:/
4:memory:/a/b c
3:cpuacct,cpu:/x (deleted)
0::/../out
"""
MOUNTS = r"""24 1 0:22 / /proc rw - proc proc rw
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
36 31 0:33 /deep /sys/fs/cgroup/memory rw shared:3 - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/lib/x,name=systemd
41 31 0:38 /low /mnt/a\040b rw - cgroup2 cgroup2 rw
42 31 0:38 / /mnt/all rw - cgroup2 cgroup2 rw,nsdelegate
"""


def test_memberships():
    assert parse_cgroup(BOTH) == (
        Membership("name=systemd", "/", deleted=False),
        Membership("memory", "/a/b c", deleted=False),
        Membership("cpu,cpuacct", "/x", deleted=True),
        Membership("", "/../out", deleted=False),
    )


def test_a_line_that_is_none():
    with pytest.raises(ValueError, match="not enough"):
        parse_cgroup("nonsense\n")


def test_hierarchies():
    assert parse_hierarchies(MOUNTS) == {
        "cpu,cpuacct": Hierarchy("/", "/sys/fs/cgroup/cpu,cpuacct"),
        "memory": Hierarchy("/deep", "/sys/fs/cgroup/memory"),
        "name=systemd": Hierarchy("/", "/sys/fs/cgroup/systemd"),
        "": Hierarchy("/", "/mnt/all"),
    }


def test_a_path_with_a_space():
    (line,) = (line for line in MOUNTS.splitlines() if "/low" in line)
    assert parse_hierarchies(line) == {"": Hierarchy("/low", "/mnt/a b")}


@pytest.mark.parametrize(
    ("hierarchy", "path", "directory"),
    [
        ("", "/", "/mnt/all"),
        ("", "/a/b", "/mnt/all/a/b"),
        ("memory", "/deep", "/sys/fs/cgroup/memory"),
        ("memory", "/deep/er", "/sys/fs/cgroup/memory/er"),
        ("memory", "/deeper", None),
        ("memory", "/", None),
        ("pids", "/", None),
    ],
)
def test_directories(hierarchy, path, directory):
    group = Membership(hierarchy, path, deleted=False)
    assert directory_of(group, parse_hierarchies(MOUNTS)) == directory
