"""What a process sees of the file system: working directory, root, file mode mask.

Kernel: /proc/PID/{cwd,root,status}, chdir(2), chroot(2), umask(2).

A deleted working directory is made under its name (`content.py`), and deleted again at the end.

Refused before the target is stopped: a root that is deleted; a working directory or root that was
moved away, or is of /proc/PID; another mount namespace; threads with a working directory of their
own.
"""

import os
from collections.abc import Iterator

import attrs

from ckpt.errors import Finding, UnsupportedState
from ckpt.kernel.arch import NR
from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp
from ckpt.kernel.procfs.files import list_tids, read_link
from ckpt.process.clones import Common
from ckpt.process.remote import Call, In, call
from ckpt.resources.base import (
    Capture,
    Rebuilt,
    Resource,
    Restore,
    RestoreOptions,
    Stage,
    Stopped,
    Target,
    expect,
)
from ckpt.resources.content import identify_link
from ckpt.resources.files.directory import directory_problem
from ckpt.resources.files.open_file import is_of_a_process
from ckpt.units import Pid

_MAX_UMASK = 0o777
_NAMES = {"cwd": "working directory", "root": "root directory"}


@attrs.frozen(slots=True, repr=False)
class FilesystemRecord:
    """Where relative and absolute paths start, and which permissions new files lack."""

    cwd: str
    """As seen from our root, as `root`."""
    root: str
    umask: int

    def __attrs_post_init__(self) -> None:
        """Refuse what is no mask."""
        if not 0 <= self.umask <= _MAX_UMASK:
            raise ValueError(f"{self.umask:#o} is no file mode mask")


def look(target: Target) -> Iterator[Finding]:
    """Name what cannot be found again by its path."""
    pid = target.pid
    for tid in list_tids(pid):
        if int(tid) != int(pid) and kcmp(pid, tid, KcmpType.FS) is not Ordering.EQUAL:
            yield Finding(
                f"thread {tid}", "has a working directory of its own, which is not supported yet"
            )
    if not os.path.samefile(f"/proc/{pid}/ns/mnt", "/proc/thread-self/ns/mnt"):
        yield Finding("mounts", "the process is in another mount namespace")
    yield from _iter_findings(pid)


def _iter_findings(pid: Pid) -> Iterator[Finding]:
    for name in _NAMES:
        path = read_link(pid, name)
        problem = _problem_of(pid, name, path)
        if problem:
            yield Finding(f"{_NAMES[name]} {path}", problem)


def _problem_of(pid: Pid, name: str, path: str) -> str:
    status = os.stat(f"/proc/{pid}/{name}")
    if is_of_a_process(path):
        return "belongs to a process in /proc, which is not supported yet"
    try:
        named = os.stat(path)
    except OSError as error:
        if name == "cwd" and identify_link(f"/proc/{pid}/cwd").content:
            return ""
        if status.st_nlink == 0 or path.endswith(" (deleted)"):
            return "is deleted, which is not supported"
        return f"cannot be found under its name ({error.strerror})"
    return "" if os.path.samestat(named, status) else "was replaced by another of the same name"


def capture(stopped: Stopped) -> Capture[FilesystemRecord]:
    """Read both directories and the mask.

    Raises:
        UnsupportedState: a directory was deleted after `look`.
    """
    findings = tuple(_iter_findings(stopped.pid))
    if findings:
        raise UnsupportedState(stopped.pid, findings)
    umask = stopped.read_status().umask
    # Only a kernel before 4.7 does not tell: then ask inside, by setting and setting back.
    replies = yield [] if umask is not None else [call(NR.umask, 0)]
    if umask is None:
        umask = replies[0].value
        yield [call(NR.umask, umask)]
    cwd = identify_link(f"/proc/{stopped.pid}/cwd").path
    return FilesystemRecord(cwd=cwd, root=read_link(stopped.pid, "root"), umask=umask)


def check_files(record: FilesystemRecord, options: RestoreOptions) -> Iterator[Finding]:
    """Name a directory that is missing."""
    for name, path in (("cwd", record.cwd), ("root", record.root)):
        made = options.content_of("", path)
        problem = "" if made is not None else directory_problem(path)
        if problem:
            yield Finding(f"{_NAMES[name]} {path}", problem, "make the directory")


def restore(record: FilesystemRecord, _rebuilt: Rebuilt) -> Restore:
    """Enter the directories, the root last: the other path is seen from ours."""
    calls = [_enter(NR.chdir, record.cwd)]
    if record.root != "/":
        calls.append(_enter(NR.chroot, record.root))
    calls.append(call(NR.umask, record.umask))
    expect("entering directories", (yield calls))


def _enter(nr: NR, path: str) -> Call:
    return call(nr, In(os.fsencode(path) + b"\0"))


FILESYSTEM = Resource(
    "filesystem",
    FilesystemRecord,
    Stage.PROCESS,
    capture=capture,
    restore=restore,
    common=Common.DIRECTORIES,
    look=look,
    check_files=check_files,
)
