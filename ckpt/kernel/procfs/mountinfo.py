r"""/proc/PID/mountinfo: what is mounted where.

Source: proc_pid_mountinfo(5). Space, tab, line end and backslash in a path are written in octal
(`\040`).
"""

import re
from collections.abc import Sequence

import attrs

from ckpt.kernel.procfs.files import read_text
from ckpt.units import Pid

_OCTAL = re.compile(r"\\([0-7]{3})")


@attrs.frozen(slots=True, repr=False)
class Mount:
    """One line."""

    id: int
    """As `mnt_id` in fdinfo."""
    parent: int
    dev: tuple[int, int]
    """Major and minor number of the file system."""
    root: str
    """Which directory of the file system is seen there."""
    path: str
    """Where it is mounted."""
    fs_type: str
    options: tuple[str, ...] = attrs.field(default=(), eq=False)
    """Of this mount: `ro`, `nosuid`."""
    fs_options: tuple[str, ...] = attrs.field(default=(), eq=False)
    """Of the file system: `size=4k`."""
    follows: bool = attrs.field(default=False, eq=False)
    """What is mounted in another namespace appears here, but not the reverse (a slave)."""


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse /proc/PID/mountinfo; in the order in which they were mounted.

    Raises:
        ValueError: a line is malformed.
    """
    return [_parse(line) for line in text.split("\n") if line]


def _parse(line: str) -> Mount:
    before, separator, after = line.partition(" - ")
    words = before.split(" ")
    if not separator or len(words) < 6:
        raise ValueError(f"not a line of mountinfo: {line!r}")
    number, parent, dev, root, path = words[:5]
    major, minor = dev.split(":")
    return Mount(
        id=int(number),
        parent=int(parent),
        dev=(int(major), int(minor)),
        root=_plain(root),
        path=_plain(path),
        fs_type=after.split(" ")[0],
        options=tuple(words[5].split(",")),
        fs_options=tuple(_plain(after.rpartition(" ")[2]).split(",")),
        follows=any(word.startswith("master:") for word in words[6:]),
    )


def _plain(path: str) -> str:
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), path)


def find_mount(mounts: Sequence[Mount], path: str) -> Mount | None:
    """Return what is seen at an absolute path without links; None if the root is not shown."""
    ids = {one.id for one in mounts}
    found = next((one for one in mounts if one.parent not in ids and one.path == "/"), None)
    while found is not None:
        behind = [one for one in mounts if one.parent == found.id and covers(one.path, path)]
        if not behind:
            break
        # The first that a walk down the path comes to.
        found = min(behind, key=lambda one: len(one.path))
    return found


def covers(folder: str, path: str) -> bool:
    """Tell whether a path is that of a directory, or below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def read_mountinfo(pid: Pid) -> list[Mount]:
    """Read /proc/PID/mountinfo.

    Raises:
        TargetGone: the process ended.
    """
    return parse_mountinfo(read_text(pid, "mountinfo"))
