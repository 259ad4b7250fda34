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
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from types import TracebackType

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.burst import Burst
from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.kernel.procfs.fdinfo import FdInfo, parse_fdinfo
from ckpt.kernel.procfs.files import list_pids
from ckpt.resources.files.survey import Raw, Survey
from ckpt.units import Fd, Pid, RemoteFd

O_LARGEFILE = 0o100000
"""Set by open(2) on a 64-bit kernel, never by pipe(2) or socket(2); Python calls it 0."""
STANDARD_STREAMS = (0, 1, 2)
LINKS = "links of files"
"""Key of `Stopped.notes`: descriptor -> what /proc/PID/fd shows, of the frozen process."""


@attrs.frozen(slots=True, repr=False)
class Problem:
    """Why a description cannot be captured, or restored here."""

    text: str
    remedy: str = ""


@attrs.frozen(slots=True, eq=False, repr=False)
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


@attrs.frozen(slots=True, eq=False, repr=False)
class _Seen:
    """One descriptor, as if nothing were shared."""

    raw: Raw
    file: OpenFile
    key: object
    """Equal for all descriptors that may share one description."""


def _see(fd: RemoteFd, raw: Raw, before: _Seen | None) -> _Seen:
    info = parse_fdinfo(raw.info.decode())
    named = (
        before is not None
        and before.raw.link == raw.link
        and os.path.samestat(before.raw.status, raw.status)
    )
    file = OpenFile((fd,), raw.link, raw.status, info, found_by_name=named)
    eventfd_id = info.eventfd.eventfd_id if info.eventfd else None
    return _Seen(raw, file, (raw.link, file.flags, info.mnt_id, info.inode, eventfd_id))


class _Sharing:
    """Which descriptors share one description; what was found once is confirmed quickly later."""

    def __init__(self, pid: Pid) -> None:
        """Know nothing yet."""
        self._pid = pid
        self._known: dict[object, list[RemoteFd]] = {}
        """Key -> its descriptors in the order of kcmp."""
        self._calls = Burst()
        """Compares each of these with the next one."""
        self._answers: list[int] = []
        self._noted: list[int] | None = None

    def learn(self, seen: dict[RemoteFd, _Seen]) -> None:
        """Find an order for all descriptors, and prepare to confirm it."""
        for key, fds in _group(seen).items():
            if len(fds) > 1 and not _is_socket(seen[fds[0]]):
                self._known[key] = sorted(fds, key=functools.cmp_to_key(self._order))
                for one, other in pairwise(self._known[key]):
                    self._calls.add(NR.kcmp, self._pid, self._pid, KcmpType.FILE, one, other)

    def confirm(self) -> None:
        """Ask whether the order still holds."""
        self._answers = list(self._calls.run())

    def note(self) -> None:
        """Note the answers, for `is_as_noted`."""
        self._noted = self._answers if _CONFIRMED.issuperset(self._answers) else None

    def is_as_noted(self) -> bool:
        """Tell whether the same are shared, if the same descriptors are as they were."""
        return self._answers == self._noted

    def partition(self, seen: dict[RemoteFd, _Seen]) -> list[list[RemoteFd]]:
        """Return the descriptors of each description, ascending, by the first of them."""
        answers = iter(self._answers)
        confirmed = {key: [next(answers) for _ in fds[1:]] for key, fds in self._known.items()}
        parts: list[list[RemoteFd]] = []
        for key, fds in _group(seen).items():
            if len(fds) == 1 or _is_socket(seen[fds[0]]):
                # A socket cannot be opened a second time: one inode is one description.
                parts.append(fds)
                continue
            ordered, order = self._known.get(key, []), confirmed.get(key, [])
            if sorted(ordered) != fds or not _CONFIRMED.issuperset(order):
                ordered = sorted(fds, key=functools.cmp_to_key(self._order))
                order = [_compare(self._pid, *pair) for pair in pairwise(ordered)]
            parts += map(sorted, _split(ordered, order))
        return sorted(parts)

    def _order(self, one: RemoteFd, other: RemoteFd) -> int:
        return _ORDER[_compare(self._pid, one, other)]


def _group(seen: dict[RemoteFd, _Seen]) -> dict[object, list[RemoteFd]]:
    groups: dict[object, list[RemoteFd]] = {}
    for fd, one in seen.items():
        groups.setdefault(one.key, []).append(fd)
    return groups


def _is_socket(seen: _Seen) -> bool:
    return stat.S_ISSOCK(seen.raw.status.st_mode)


def _split(ordered: list[RemoteFd], order: Sequence[int]) -> Iterator[list[RemoteFd]]:
    """Cut an ordered list where one is not equal to the next."""
    run = ordered[:1]
    for fd, answer in zip(ordered[1:], order, strict=True):
        if answer != Ordering.EQUAL:
            yield run
            run = []
        run.append(fd)
    yield run


_CONFIRMED = frozenset({int(Ordering.EQUAL), int(Ordering.LESS)})
_ORDER = {Ordering.EQUAL: 0, Ordering.LESS: -1, Ordering.GREATER: 1, Ordering.DIFFERENT: 1}


def _compare(pid: Pid, fd1: RemoteFd, fd2: RemoteFd) -> Ordering:
    try:
        return kcmp(pid, pid, KcmpType.FILE, fd1, fd2)
    except OSError:
        # One was closed meanwhile: the process runs, and its end will not be asked of this look.
        return Ordering.DIFFERENT


class FdTable:
    """All open file descriptions of a process; a context manager, for it holds a pidfd."""

    def __init__(self, pid: Pid, looked: "FdTable | None" = None, *, running: bool = False) -> None:
        """Read what is open.

        Args:
            pid: the process.
            looked: an earlier table, made before the process was stopped; what has not changed
                since is not examined again.
            running: whether it changes while we read, and there is time.
        """
        self.pid = pid
        self.running = running
        self._pidfd: Fd | None = None
        self.survey: Survey = looked.survey if looked else Survey(pid)
        self._sharing: _Sharing = looked._sharing if looked else _Sharing(pid)
        self._again: dict[RemoteFd, _Seen] = {}
        """What a later table takes over of this one, where nothing has changed; so the next."""
        self._files_again: list[OpenFile] = []
        if running:
            self.survey.prepare()
        before = looked._again if looked else {}
        self._raw = self.survey.read()
        if looked and self._raw is looked._raw and len(self._raw) == len(before):
            self._seen = before
        else:
            self._seen = self._see_all(before)
        self._unchanged = {
            fd for fd, one in self._seen.items() if fd in before and before[fd].raw is one.raw
        }
        if running:
            self._sharing.learn(self._seen)
        self._sharing.confirm()
        if looked and self._seen is before and self._sharing.is_as_noted():
            self.files = looked._files_again
        else:
            self.files = self._join_all()

    def _see_all(self, before: dict[RemoteFd, _Seen]) -> dict[RemoteFd, _Seen]:
        seen = {}
        for fd, raw in self._raw.items():
            known = before.get(fd)
            if known is not None and known.raw is raw:
                seen[fd] = known
            else:
                seen[fd] = _see(fd, raw, known)
        return seen

    def _join_all(self) -> list[OpenFile]:
        parts = self._sharing.partition(self._seen)
        first = (self._seen[fds[0]].file for fds in parts)
        return [
            file if len(fds) == 1 else attrs.evolve(file, fds=tuple(fds))
            for file, fds in zip(first, parts, strict=True)
        ]

    def note_found(self, files: Iterable[OpenFile]) -> None:
        """Note which descriptions nothing is wrong with: what has a path was found there."""
        for file in files:
            for fd in file.fds:
                seen = self._seen[fd]
                named = attrs.evolve(seen.file, found_by_name=True)
                self._again[fd] = attrs.evolve(seen, file=named)
        self._files_again = [attrs.evolve(file, found_by_name=True) for file in self.files]
        self._sharing.note()
        self.survey.ask_by_path(self._again)

    @property
    def close_on_exec(self) -> set[RemoteFd]:
        """The descriptors that are closed by exec."""
        return {fd for fd, one in self._seen.items() if one.file.info.close_on_exec}

    @property
    def links(self) -> dict[RemoteFd, str]:
        """Descriptor -> what /proc/PID/fd shows of it."""
        return {fd: one.raw.link for fd, one in self._seen.items()}

    def is_unchanged(self, file: OpenFile) -> bool:
        """Tell whether all that was read of it is as it was in the earlier table."""
        return self._unchanged.issuperset(file.fds)

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

    def is_written(self, file: OpenFile) -> bool:
        """Tell whether some description of the process may write the file behind `file`."""
        return (file.status.st_dev, file.status.st_ino) in self._written

    @functools.cached_property
    def _written(self) -> set[tuple[int, int]]:
        return {(f.status.st_dev, f.status.st_ino) for f in self.files if f.writable}

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
