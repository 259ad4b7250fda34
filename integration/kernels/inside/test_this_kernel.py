"""The machine is the one that was asked for."""

import os
import platform
from pathlib import Path

from integration.kernels.inside_run import ENV_RELEASE


def test_the_booted_kernel_is_the_one_that_was_asked_for():
    assert platform.release() == os.environ[ENV_RELEASE]


def test_temporary_files_lie_on_tmpfs(tmp_path):
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    types = {where: kind for _, where, kind, *_ in mounts}
    below = [where for where in types if tmp_path.is_relative_to(where)]
    assert types[max(below, key=len)] == "tmpfs"


def test_a_mapped_file_is_the_file_that_stat_sees():
    for line in Path("/proc/self/maps").read_text().splitlines():
        *_, device, inode, path = line.split(maxsplit=5) if "/" in line else [""] * 3
        if path:
            seen = Path(path).stat()
            assert device == f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}", path
            assert int(inode) == seen.st_ino, path
