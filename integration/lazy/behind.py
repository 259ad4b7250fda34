"""The processes behind a lazily restored one: found, waited for, killed."""

import contextlib
import os
import select
from collections.abc import Iterator
from pathlib import Path

GUARD, SERVER = "ckpt-guard", "ckpt-pages"
WAIT_S = 120.0  # far beyond what filling needs: only a hang reaches it


def iter_named(name: str) -> Iterator[int]:
    """Yield all processes of that name."""
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            with contextlib.suppress(OSError):
                if (directory / "comm").read_text().strip() == name:
                    yield int(directory.name)


def read_parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def find_child(parent: int, name: str) -> int | None:
    for pid in iter_named(name):
        with contextlib.suppress(OSError):
            if read_parent(pid) == parent:
                return pid
    return None


def find_server(restorer: int) -> int | None:
    """Return the server of a `ckpt restore` that still runs; None: it is done, or not needed."""
    guard = find_child(restorer, GUARD)
    return None if guard is None else find_child(guard, SERVER)


def wait_for_end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            assert select.select([fd], [], [], WAIT_S)[0], f"process {pid} does not end"
        finally:
            os.close(fd)


def wait_until_filled(restorer: int) -> None:
    """Wait until all memory is there; returns at once if none was left to come."""
    guard = find_child(restorer, GUARD)
    if guard is not None:
        wait_for_end(guard)
