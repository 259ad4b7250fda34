"""The promise: what /proc/sysvipc shows is understood, and nothing else is taken for a segment."""

import pytest

from ckpt.kernel.sysvipc import Permissions, is_segment, parse_sysvipc

SHM = """\
       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid
        -1          0  1640                 56432   100   101      6   999   998     0     0
"""
SEM = """\
       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime
     24122      32768   640          3     0     0     0     0          0 1700000000
"""


def test_a_segment():
    (segment,) = parse_sysvipc(SHM)
    assert segment.id == 0
    assert segment.permissions == Permissions(-1, 999, 998, 0o1640)
    assert (segment.fields["size"], segment.fields["nattch"]) == (56432, 6)


def test_a_set_of_semaphores():
    (one,) = parse_sysvipc(SEM)
    assert (one.id, one.fields["nsems"], one.permissions.mode) == (32768, 3, 0o640)


def test_nothing_but_the_first_line():
    assert parse_sysvipc(SEM.splitlines(keepends=True)[0]) == []


def test_a_line_that_is_too_short():
    with pytest.raises(ValueError, match="zip"):
        parse_sysvipc(SEM + "1 2 3\n")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/SYSV0052e2c1", True),
        ("/SYSV00000000", True),
        ("/SYSV0052e2c1x", False),
        ("/SYSV", False),
        ("/var/SYSV0052e2c1", False),
        (None, False),
    ],
)
def test_what_is_a_segment(path, expected):
    assert is_segment(path) is expected
