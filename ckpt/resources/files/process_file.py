"""Files and directories of /proc/PID, and namespaces, of the processes of the tree themselves.

    /proc/4711/status, opened as /proc/self/status     opened again inside, as the same file
    net:[4026531833], the namespace that 4711 is in    /proc/4711/ns/net of the restored process

They belong to a process that must exist first: `late` opens them inside. What is read from them is
what is so then.

Kernel: proc(5), namespaces(7).

Refused before the target is stopped: files of a process outside the tree, of one that has ended, of
a thread that does not lead its process, below `fd`, `fdinfo` and `map_files` (they name what is not
there yet), and namespaces that no process of the tree is in.

A descriptor of memory (`mem`, `maps`, ...) that was opened before an exec shows the old program,
which has ended; the restored one shows the new.
"""

import os
import re

import attrs

from ckpt.process.pid_space import Numbers
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening
from ckpt.resources.files import late
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.units import Fd

_PATH = re.compile(r"/proc/(\d+)(/.*)?")
_NAMESPACE = re.compile(r"(cgroup|ipc|mnt|net|pid|time|user|uts):\[\d+\]")
_NOT_YET = re.compile(r"(/task/\d+)?/(fd|fdinfo|map_files)/.")
_TASK = re.compile(r"/task/(\d+)(/|$)")


@attrs.frozen(slots=True, repr=False)
class ProcessFileRecord:
    """A file of /proc/PID, and where in it the description stands."""

    path: str
    """With the pid as the tree knows it."""
    offset_bytes: int

    def __attrs_post_init__(self) -> None:
        """Refuse every other file."""
        if not _PATH.fullmatch(self.path):
            raise ValueError(f"{self.path} is no file of a process")


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return bool(_PATH.fullmatch(file.link) or _NAMESPACE.fullmatch(file.link))


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    found = _PATH.fullmatch(file.link)
    if found:
        return _problem_of_file(file, int(found[1]), found[2] or "", table)
    if _namespace_of(file, table) is None:
        kind = file.link.partition(":")[0]
        return Problem(
            f"is a {kind} namespace that no process of what is dumped is in, which is not supported"
        )
    return None


def _problem_of_file(file: OpenFile, pid: int, rest: str, table: FdTable) -> Problem | None:
    task = _TASK.match(rest)
    if task and int(task[1]) != pid:
        return Problem(f"is a file of thread {task[1]} in /proc, which is not supported yet")
    if _NOT_YET.match(rest):
        return Problem("is a file of /proc that names a descriptor or a mapping, not supported yet")
    if file.found_by_name:
        return None
    # Of a process that has ended nothing is found, even if its number is used again.
    try:
        is_there = os.path.samestat(os.stat(file.link), file.status)
    except OSError:
        is_there = False
    if not is_there:
        return Problem("is a file of /proc that belongs to a process that has ended")
    if late.is_of_tree(pid, table):
        return None
    return Problem(
        f"is a file of process {pid} in /proc, which does not belong to what is dumped",
        "dump a process that both descend from",
    )


def _namespace_of(file: OpenFile, table: FdTable) -> str | None:
    """Return under which path a process of the tree shows a namespace; None if none does."""
    name = file.link.partition(":")[0]
    for pid in late.pids_of_tree(table):
        path = f"/proc/{pid}/ns/{name}"
        try:
            if os.path.samestat(os.stat(path), file.status):
                return path
        except OSError:
            continue
    return None


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> ProcessFileRecord:
    """See `Kind.capture`."""
    if not _NAMESPACE.fullmatch(file.link):
        return ProcessFileRecord(file.link, file.info.pos)
    path = _namespace_of(file, table)
    assert path is not None
    return ProcessFileRecord(path, 0)


def renumber(record: ProcessFileRecord, numbers: Numbers) -> ProcessFileRecord:
    """See `Kind.renumber`."""
    found = _PATH.fullmatch(record.path)
    assert found is not None
    path = f"/proc/{numbers.of(int(found[1]))}{found[2] or ''}"
    task = _TASK.match(found[2] or "")
    if task:
        path = path.replace(f"/task/{task[1]}", f"/task/{numbers.of(int(task[1]))}", 1)
    return attrs.evolve(record, path=path)


def open_again(record: ProcessFileRecord, flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    return late.hold_path(record.path, flags, record.offset_bytes)


PROCESS_FILE = Kind(
    "process_file",
    ProcessFileRecord,
    matches=matches,
    problem=problem,
    capture=capture,
    open=open_again,
    renumber=renumber,
)
