"""Who has which side of which pseudo-terminal open; from outside, by /proc.

Kernel: proc_pid_fd(5), proc_pid_fdinfo(5) (`tty-index` of a master).
"""

import contextlib
import os
from collections.abc import Iterator

from ckpt.kernel.procfs.fdinfo import read_fdinfo
from ckpt.kernel.procfs.files import list_pids
from ckpt.resources.files.fd_table import FdTable, FdTables
from ckpt.units import Pid, RemoteFd

MASTER, SLAVE = "master", "slave"
DIRECTORY = "/dev/pts"
PTMX = (f"{DIRECTORY}/ptmx", "/dev/ptmx")
"""Where masters are opened. The first is of use where its mode allows it."""
UNKNOWN = -1


def find_elsewhere(table: FdTable) -> dict[tuple[str, int], Pid]:
    """Return side and number -> a process outside that has it open; nothing of a frozen process.

    Looked for once in the life of a table: it takes some milliseconds.
    """
    return table.tables.once("terminals elsewhere", lambda: _find_outside(table.tables))


def _find_outside(tables: FdTables) -> dict[tuple[str, int], Pid]:
    others = (pid for pid in list_pids() if tables.running and not tables.seen_of(pid))
    return {end: pid for pid in others for end in _iter_ends(pid)}


def numbers_of_masters(pid: Pid) -> list[int]:
    """Return N of /dev/pts/N for each master that a process has open."""
    return [number for side, number in _iter_ends(pid) if side == MASTER]


def _iter_ends(pid: Pid) -> Iterator[tuple[str, int]]:
    """Yield side and number of the pseudo-terminals that a process has open, as far as we may."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError, ValueError):
                link = os.readlink(f"/proc/{pid}/fd/{name}")
                if link.startswith(f"{DIRECTORY}/") and link not in PTMX:
                    yield SLAVE, int(link.rpartition("/")[2])
                elif link in PTMX:
                    info = read_fdinfo(pid, RemoteFd(int(name)))
                    yield MASTER, int((info and info.other_value("tty-index")) or UNKNOWN)
