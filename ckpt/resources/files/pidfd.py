"""Descriptors of processes: pidfds.

Kernel: pidfd_open(2); fdinfo says whom they are of. A process of the tree has no descriptor before
it exists, so `late` opens it inside. One whose process has ended and was waited for is made in the
restorer, from a child that has ended, too.

Refused before the target is stopped: pidfds of processes outside the tree, and of single threads
(PIDFD_THREAD). What an ended process has left for PIDFD_GET_INFO is lost.
"""

import os
import stat

import attrs

from ckpt.kernel.pidfd import PIDFD_NONBLOCK, PIDFD_THREAD, pidfd_open
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening
from ckpt.resources.files import late
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, set_status_flags
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.units import Fd, Pid

_ENDED = -1


@attrs.frozen(slots=True, repr=False)
class PidfdRecord:
    """Whom it is of."""

    pid: int
    """As the tree knows it; 0 if the process has ended and was waited for."""

    def __attrs_post_init__(self) -> None:
        """Refuse what is no process."""
        if self.pid < 0:
            raise ValueError(f"there is no process {self.pid}")


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    # /proc/PID itself, open as a directory, is of another kind.
    return file.info.pidfd is not None and not stat.S_ISDIR(file.status.st_mode)


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    pidfd = file.info.pidfd
    assert pidfd is not None
    if file.flags & PIDFD_THREAD:
        return Problem("is a pidfd of a single thread, which is not supported yet")
    if pidfd.pid == _ENDED or late.is_of_tree(pidfd.pid, table):
        return None
    return Problem(
        f"is a pidfd of process {pidfd.pid or '(in another pid namespace)'}, which does not belong"
        " to what is dumped",
        "dump a process that both descend from",
    )


def capture(file: OpenFile, _table: FdTable, _replies: list[Reply]) -> PidfdRecord:
    """See `Kind.capture`."""
    pidfd = file.info.pidfd
    assert pidfd is not None
    return PidfdRecord(pidfd.ns_pids[-1] if pidfd.ns_pids else 0)


def open_again(record: PidfdRecord, flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    if record.pid:
        return late.hold_pidfd(record.pid, flags & PIDFD_NONBLOCK)
    fd = _of_an_ended_process()
    set_status_flags(fd, flags)
    return fd


def _of_an_ended_process() -> Fd:
    child = Pid(os.fork())
    if child == 0:
        os._exit(0)
    try:
        return pidfd_open(child)
    finally:
        os.waitpid(child, 0)


PIDFD = Kind(
    "pidfd",
    PidfdRecord,
    matches=matches,
    problem=problem,
    reads_nothing=True,
    capture=capture,
    open=open_again,
)
