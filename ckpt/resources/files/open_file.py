"""One open file description of a tree, as /proc shows it; `fd_table` finds all of them.

Kernel: /proc/PID/fd, /proc/PID/fdinfo (proc_pid_fdinfo(5)).
"""

import os
import stat

import attrs

from ckpt.kernel.procfs.fdinfo import FdInfo
from ckpt.units import Pid, RemoteFd

O_LARGEFILE = 0o100000
"""Set by open(2) on a 64-bit kernel, never by pipe(2) or socket(2); Python calls it 0."""
STANDARD_STREAMS = (0, 1, 2)
LINKS = "links of files"
"""Key of `Stopped.notes`: descriptor -> what /proc/PID/fd shows, of the frozen process."""
LEASES = "leases"
"""Key of `Tree.notes`: whether a descriptor of the frozen tree has a lease."""


Slot = tuple[Pid, RemoteFd]
"""A descriptor of a process."""


@attrs.frozen(slots=True, repr=False)
class Problem:
    """Why a description cannot be captured, or restored here."""

    text: str
    remedy: str = ""
    leads_outside: bool = False
    """It would not be one if the user declared it to lead outside the tree (`outside`)."""
    wants_address: bool = False
    """All that is missing is an IP address of this host."""


@attrs.frozen(slots=True, eq=False, repr=False)
class OpenFile:
    """One open file description of the tree."""

    pid: Pid
    """The first process that has it open."""
    fds: tuple[RemoteFd, ...]
    """Its descriptors there, ascending."""
    link: str
    """What /proc/PID/fd shows: a path, or `pipe:[4711]` and the like."""
    status: os.stat_result
    info: FdInfo
    """By the first descriptor."""
    found_by_name: bool = False
    """Its path was found to name it before the process was stopped, and has not changed since."""
    others: tuple[Slot, ...] = ()
    """Its descriptors in other processes, in their order."""

    @property
    def fd(self) -> RemoteFd:
        """The first descriptor."""
        return self.fds[0]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All its descriptors."""
        return (*((self.pid, fd) for fd in self.fds), *self.others)

    @property
    def flags(self) -> int:
        """Access mode and status flags of open(2), without the descriptor's own O_CLOEXEC."""
        return self.info.flags & ~os.O_CLOEXEC

    @property
    def readable(self) -> bool:
        """Tell whether it was opened for reading."""
        return may_read(self.flags)

    @property
    def writable(self) -> bool:
        """Tell whether it was opened for writing."""
        return may_write(self.flags)

    @property
    def path_only(self) -> bool:
        """Tell whether it names a file without opening it (O_PATH)."""
        return bool(self.flags & os.O_PATH)

    def is_same_file(self, other: "OpenFile") -> bool:
        """Tell whether both are of one inode."""
        return os.path.samestat(self.status, other.status)


def may_read(flags: int) -> bool:
    """Tell whether a description with these flags can be read."""
    return not flags & os.O_PATH and flags & os.O_ACCMODE != os.O_WRONLY


def may_write(flags: int) -> bool:
    """Tell whether a description with these flags can be written."""
    return not flags & os.O_PATH and flags & os.O_ACCMODE != os.O_RDONLY


def outside_problem(name: str, text: str) -> Problem:
    """Tell that something leads outside the tree, and what can be done about it."""
    remedy = f"dump it with --external '{name}', and restore it with --inherit '{name}=FD'"
    return Problem(text, remedy, leads_outside=True)


def path_problem(file: OpenFile) -> Problem | None:
    """Tell why the file cannot be opened again by its name; None if it can."""
    link, status = file.link, file.status
    if file.found_by_name:
        return None
    if not link.startswith("/"):
        return Problem("has no path, which is not supported yet")
    if link.startswith("/memfd:"):
        return Problem("is a memfd, which is not supported yet")
    if is_of_a_process(link):
        return Problem("is a file of /proc that belongs to a process, which is not supported yet")
    try:
        named = os.lstat(link) if stat.S_ISLNK(status.st_mode) else os.stat(link)
    except OSError as error:
        if status.st_nlink == 0 or link.endswith(" (deleted)"):
            return Problem("is deleted, which is not supported yet")
        return Problem(f"cannot be found under its name ({error.strerror})")
    if os.path.samestat(named, status):
        return None
    return Problem("was deleted or moved away, and another file has its name")


def is_of_a_process(path: str) -> bool:
    """Tell whether the path is below /proc/PID: there will be another one after a restore."""
    return path.startswith("/proc/") and path[6:7].isdigit()


def is_made_by_the_kernel(path: str) -> bool:
    """Tell whether size and modification time mean nothing, since no file is stored anywhere."""
    return path.startswith(("/proc/", "/sys/"))
