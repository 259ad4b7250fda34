"""The open file descriptions of a process, each once, as /proc shows them.

Several descriptors may share one description (dup, fork): they share offset and status flags, and
must do so after a restore. KCMP_FILE tells; it is asked only within groups that agree in all that
fdinfo says, so that a thousand descriptors do not cost a million comparisons.

Kernel: /proc/PID/fd, /proc/PID/fdinfo (proc_pid_fdinfo(5)), kcmp(2), pidfd_getfd(2).
"""

import contextlib
import functools
import os
import stat
from collections.abc import Iterator
from types import TracebackType

import attrs

from ckpt.errors import TargetGone
from ckpt.kernel.failures import proc_failures_of
from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp
from ckpt.kernel.libc import PAGE_SIZE
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.kernel.procfs.fdinfo import FdInfo, parse_fdinfo, read_fdinfo
from ckpt.kernel.procfs.files import list_pids
from ckpt.units import Fd, Pid, RemoteFd

O_LARGEFILE = 0o100000
"""Set by open(2) on a 64-bit kernel, never by pipe(2) or socket(2); Python calls it 0."""
STANDARD_STREAMS = (0, 1, 2)


@attrs.frozen(slots=True)
class Problem:
    """Why a description cannot be captured, or restored here."""

    text: str
    remedy: str = ""


@attrs.frozen(slots=True, eq=False)
class OpenFile:
    """One open file description of the target."""

    fds: tuple[RemoteFd, ...]
    """Its descriptors, ascending."""
    link: str
    """What /proc/PID/fd shows: a path, or `pipe:[4711]` and the like."""
    status: os.stat_result
    info: FdInfo
    """By the first descriptor."""
    found_by_name: bool = False
    """Its path was found to name it before the process was stopped, and has not changed since."""

    @property
    def fd(self) -> RemoteFd:
        """The first descriptor."""
        return self.fds[0]

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


class FdTable:
    """All open file descriptions of a process; a context manager, for it holds a pidfd."""

    def __init__(self, pid: Pid, looked: "Seen | None" = None) -> None:
        """Read what is open.

        Args:
            pid: the process.
            looked: `seen` of an earlier table, made before the process was stopped; what has not
                changed since is not examined again. None: it runs, and there is time.
        """
        self.pid = pid
        self.running = looked is None
        self._pidfd: Fd | None = None
        self.seen = _survey(pid, looked or {})
        self.close_on_exec = {fd for fd, seen in self.seen.items() if seen[1].info.close_on_exec}
        self.files = _merge(pid, [file for _, file in self.seen.values()], exact=not self.running)

    def __enter__(self) -> "FdTable":
        """Nothing more to do."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the pidfd."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    @contextlib.contextmanager
    def borrow(self, file: OpenFile) -> Iterator[Fd]:
        """Lend a descriptor of ours on the target's description; what is set there is set for it.

        Raises:
            TargetGone: the process ended.
            OSError: EBADF, the descriptor was closed meanwhile.
        """
        if self._pidfd is None:
            self._pidfd = pidfd_open(self.pid)
        fd = pidfd_getfd(self._pidfd, file.fd, pid=self.pid)
        try:
            yield fd
        finally:
            os.close(fd)

    @functools.cached_property
    def by_fd(self) -> dict[int, OpenFile]:
        """Descriptor number -> description."""
        return {fd: file for file in self.files for fd in file.fds}

    def same_inode(self, file: OpenFile) -> list[OpenFile]:
        """Return all descriptions of the file behind `file`, itself included, in their order."""
        return self._by_inode[file.status.st_dev, file.status.st_ino]

    @functools.cached_property
    def _by_inode(self) -> dict[tuple[int, int], list[OpenFile]]:
        groups: dict[tuple[int, int], list[OpenFile]] = {}
        for file in self.files:
            groups.setdefault((file.status.st_dev, file.status.st_ino), []).append(file)
        return groups

    @functools.cached_property
    def links_elsewhere(self) -> dict[str, Pid]:
        """Pipe -> another process that has it open too. Reads /proc/*/fd: some milliseconds."""
        elsewhere: dict[str, Pid] = {}
        for pid in list_pids():
            if pid != self.pid:
                for link in _iter_links(pid):
                    if link.startswith("pipe:"):
                        elsewhere.setdefault(link, pid)
        return elsewhere


def _iter_links(pid: Pid) -> Iterator[str]:
    """Yield what a process has open; less, if it ends or closes meanwhile or may not be asked."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/{pid}/fd/{name}")


Seen = dict[RemoteFd, tuple[bytes, OpenFile]]
"""Descriptor -> its fdinfo, and what is behind it (as if nothing were shared)."""

_FDINFO_BYTES = PAGE_SIZE
"""Most of the files are short; one that fills this is read again in full."""


def _survey(pid: Pid, looked: Seen) -> Seen:
    """Return every descriptor of the process, ascending.

    Five system calls for each, below two directories that are opened once: this is what a frozen
    target waits for.
    """
    seen: Seen = {}
    with _opened(pid, "fd") as links, _opened(pid, "fdinfo") as infos:
        for fd in sorted(map(int, os.listdir(links))):
            found = _examine(pid, RemoteFd(fd), links, infos, looked)
            if found is not None:
                seen[RemoteFd(fd)] = found
    return seen


@contextlib.contextmanager
def _opened(pid: Pid, name: str) -> Iterator[int]:
    with proc_failures_of(pid, f"list /proc/{pid}/{name}"):
        directory = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield directory
        finally:
            os.close(directory)


def _examine(
    pid: Pid, fd: RemoteFd, links: int, infos: int, looked: Seen
) -> tuple[bytes, OpenFile] | None:
    """Return fdinfo and description of a descriptor; None if it was closed meanwhile."""
    name = str(fd)
    try:
        raw = _read_raw(name, infos)
        link = os.readlink(name, dir_fd=links)
        status = os.stat(name, dir_fd=links)
    except FileNotFoundError:
        return None
    before_raw, before = looked.get(fd, (b"", None))
    if before is None or before.link != link or not os.path.samestat(before.status, status):
        return raw, OpenFile((fd,), link, status, _parse(pid, fd, raw))
    info = before.info if raw == before_raw else _parse(pid, fd, raw)
    return raw, OpenFile((fd,), link, status, info, found_by_name=True)


def _read_raw(name: str, directory: int) -> bytes:
    file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        return os.read(file, _FDINFO_BYTES)
    finally:
        os.close(file)


def _parse(pid: Pid, fd: RemoteFd, raw: bytes) -> FdInfo:
    # A full read of an epoll with thousands of items may take several reads.
    complete = len(raw) < _FDINFO_BYTES
    info = parse_fdinfo(raw.decode()) if complete else read_fdinfo(pid, fd)
    if info is None:
        raise TargetGone(pid)
    return info


def _merge(pid: Pid, files: list[OpenFile], *, exact: bool) -> list[OpenFile]:
    """Join what is one description; by the first descriptor ascending.

    Args:
        pid: the process.
        files: each with one descriptor.
        exact: nothing changes meanwhile, so that equal descriptions have equal offsets.
    """
    groups: dict[object, list[OpenFile]] = {}
    for file in files:
        info = file.info
        eventfd_id = info.eventfd.eventfd_id if info.eventfd else None
        offset = info.pos if exact else 0
        key = (file.link, file.flags, info.mnt_id, info.inode, eventfd_id, offset)
        groups.setdefault(key, []).append(file)
    merged = [file for group in groups.values() for file in _merge_equal(pid, group)]
    return sorted(merged, key=lambda file: file.fd)


def _merge_equal(pid: Pid, group: list[OpenFile]) -> Iterator[OpenFile]:
    """Join the members of a group that are one description."""
    if len(group) == 1 or stat.S_ISSOCK(group[0].status.st_mode):
        # A socket cannot be opened a second time: one inode is one description.
        yield _join(group)
        return

    def order(a: OpenFile, b: OpenFile) -> int:
        return _ORDER[_compare(pid, a.fd, b.fd)]

    run: list[OpenFile] = []
    for file in sorted(group, key=functools.cmp_to_key(order)):
        if run and order(run[-1], file) != 0:
            yield _join(run)
            run = []
        run.append(file)
    yield _join(run)


_ORDER = {Ordering.EQUAL: 0, Ordering.LESS: -1, Ordering.GREATER: 1, Ordering.DIFFERENT: 1}


def _compare(pid: Pid, fd1: RemoteFd, fd2: RemoteFd) -> Ordering:
    try:
        return kcmp(pid, pid, KcmpType.FILE, fd1, fd2)
    except OSError:
        # One was closed meanwhile: the process runs, and its end will not be asked of this look.
        return Ordering.DIFFERENT


def _join(files: list[OpenFile]) -> OpenFile:
    if len(files) == 1:
        return files[0]
    first = min(files, key=lambda file: file.fd)
    return attrs.evolve(first, fds=tuple(sorted(file.fd for file in files)))


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
