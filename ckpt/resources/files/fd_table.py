"""All open file descriptions of a tree, each once, and how each process sees them.

    FdTables    the whole tree:   survey of each process, who shares what
     └ FdTable  one process:      its descriptors; what the kinds of files are given

Kernel: /proc/PID/fd, /proc/PID/fdinfo, pidfd_getfd(2).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import attrs

from ckpt.errors import TargetGone
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.kernel.procfs.files import list_pids
from ckpt.resources.base import Tree
from ckpt.resources.files.open_file import OpenFile, Slot
from ckpt.resources.files.sharing import Seen, Sharing, see
from ckpt.resources.files.survey import Raw, Survey
from ckpt.units import Fd, Pid, RemoteFd

_T = TypeVar("_T")


class FdTables:
    """The open file descriptions of all processes of a tree."""

    def __init__(
        self,
        pids: Sequence[Pid],
        looked: "FdTables | None" = None,
        *,
        running: bool = False,
        tree: Tree | None = None,
    ) -> None:
        """Read what is open.

        Args:
            pids: the processes, in the order that decides who counts as the first to have a file.
            looked: the tables from before the processes were stopped; what has not changed since
                is not examined again.
            running: whether they change while we read, and there is time. One that ends is left
                out then.
            tree: to which they belong; one of their own unless given.
        """
        self.tree = tree or Tree(tuple(pids))
        """To which the processes belong; `Tree.forget` closes what is open here."""
        self._asked: dict[str, Any] = {}
        self.running = running
        self._looked = looked
        self._surveys: dict[Pid, Survey] = {}
        self._sharing: Sharing = looked._sharing if looked else Sharing()
        self._raw: dict[Pid, dict[RemoteFd, Raw]] = {}
        self._seen: dict[Pid, dict[RemoteFd, Seen]] = {}
        self._found: dict[Slot, Seen] = {}
        """What a later table takes over of this one, where nothing has changed."""
        self._as_before = looked is not None
        for pid in pids:
            try:
                self._read(pid)
            except TargetGone:
                if not running:
                    raise
        slots = {(pid, fd): one for pid, seen in self._seen.items() for fd, one in seen.items()}
        if running:
            self._sharing.learn(slots)
        self._sharing.confirm()
        same = looked is not None and self._as_before and self._seen.keys() == looked._seen.keys()
        if same and looked is not None and self._sharing.is_as_noted():
            self.files = looked._files_again
        else:
            self.files = [_join(slots, part) for part in self._sharing.partition(slots)]
        self._files_again: list[OpenFile] = self.files.copy()
        """What a later table has for its `files`, if nothing has changed."""

    def _read(self, pid: Pid) -> None:
        survey = self._looked._surveys.get(pid) if self._looked else None
        before: dict[RemoteFd, Seen] = {}
        if survey is None:
            survey = Survey(pid)
            self.tree.at_forgotten.append(survey.close)
        elif self._looked:
            before = self._looked._again(pid)
        if self.running:
            survey.prepare()
        raw = self._raw[pid] = survey.read()
        self._surveys[pid] = survey
        if before and self._looked and self._looked._raw[pid] is raw and len(raw) == len(before):
            self._seen[pid] = before
            return
        self._as_before = False
        seen = {}
        for fd, one in raw.items():
            known = before.get(fd)
            seen[fd] = known if known and known.raw is one else see(pid, fd, one, known)
        self._seen[pid] = seen

    def _again(self, pid: Pid) -> dict[RemoteFd, Seen]:
        return {fd: self._found[pid, fd] for fd in self._seen[pid] if (pid, fd) in self._found}

    def note_found(self, files: Iterable[OpenFile]) -> None:
        """Note which descriptions nothing is wrong with: what has a path was found there."""
        asked: dict[Pid, list[RemoteFd]] = {}
        for file in files:
            index = self.by_slot[file.pid, file.fd]
            self._files_again[index] = attrs.evolve(file, found_by_name=True)
            for pid, fd in file.slots:
                seen = self._seen[pid][fd]
                named = attrs.evolve(seen.file, found_by_name=True)
                self._found[pid, fd] = attrs.evolve(seen, file=named)
                asked.setdefault(pid, []).append(fd)
        self._sharing.note()
        for pid, fds in asked.items():
            self._surveys[pid].ask_by_path(fds)

    def is_unchanged(self, file: OpenFile) -> bool:
        """Tell whether all that was read of it is as it was when it was looked at."""
        looked = self._looked
        return looked is not None and all(
            (pid, fd) in looked._found and looked._found[pid, fd].raw is self._seen[pid][fd].raw
            for pid, fd in file.slots
        )

    def seen_of(self, pid: Pid) -> dict[RemoteFd, Seen]:
        """Return the descriptors of one process, ascending; none if it has ended."""
        return self._seen.get(pid, {})

    @functools.cached_property
    def by_slot(self) -> dict[Slot, int]:
        """Process and descriptor -> index into `files`."""
        return {slot: index for index, file in enumerate(self.files) for slot in file.slots}

    @functools.cached_property
    def by_first(self) -> dict[Pid, list[OpenFile]]:
        """Process -> the descriptions of which it is the first that has them open."""
        groups: dict[Pid, list[OpenFile]] = {}
        for file in self.files:
            groups.setdefault(file.pid, []).append(file)
        return groups

    @functools.cached_property
    def by_inode(self) -> dict[tuple[int, int], list[OpenFile]]:
        """Device and inode -> all descriptions of that file."""
        groups: dict[tuple[int, int], list[OpenFile]] = {}
        for file in self.files:
            groups.setdefault((file.status.st_dev, file.status.st_ino), []).append(file)
        return groups

    @functools.cached_property
    def written(self) -> set[tuple[int, int]]:
        """Device and inode of the files that some description may write."""
        return {(f.status.st_dev, f.status.st_ino) for f in self.files if f.writable}

    @functools.cached_property
    def links_elsewhere(self) -> dict[str, Pid]:
        """Pipe or socket -> a process outside that has it too. Reads /proc/*/fd: milliseconds."""
        elsewhere: dict[str, Pid] = {}
        for pid in list_pids():
            if pid not in self._seen:
                for link in _iter_links(pid):
                    if link.startswith(("pipe:", "socket:")):
                        elsewhere.setdefault(link, pid)
        return elsewhere

    def once(self, key: str, find: Callable[[], _T]) -> _T:
        """Return what `find` has found when it was first asked for by this key."""
        if key not in self._asked:
            self._asked[key] = find()
        found: _T = self._asked[key]
        return found


def _join(slots: dict[Slot, Seen], part: list[Slot]) -> OpenFile:
    first = slots[part[0]].file
    if len(part) == 1:
        return first
    own = tuple(fd for pid, fd in part if pid == first.pid)
    return attrs.evolve(first, fds=own, others=tuple(s for s in part if s[0] != first.pid))


def _iter_links(pid: Pid) -> Iterator[str]:
    """Yield what a process has open; less, if it ends or closes meanwhile or may not be asked."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/{pid}/fd/{name}")


@attrs.frozen(slots=False, eq=False, repr=False)
class FdTable:
    """The descriptors of one process, and what of the tree's files belongs with them."""

    tables: FdTables
    pid: Pid

    @property
    def tree(self) -> Tree:
        """To which the process belongs: what the user chose, what is noted."""
        return self.tables.tree

    @property
    def running(self) -> bool:
        """Whether the process changes while we read, and there is time."""
        return self.tables.running

    @property
    def files(self) -> list[OpenFile]:
        """All descriptions of the tree."""
        return self.tables.files

    @functools.cached_property
    def own_files(self) -> list[OpenFile]:
        """The descriptions of which this process is the first that has them open."""
        return self.tables.by_first.get(self.pid, [])

    @property
    def close_on_exec(self) -> set[RemoteFd]:
        """The descriptors that are closed by exec."""
        seen = self.tables.seen_of(self.pid)
        return {fd for fd, one in seen.items() if one.file.info.close_on_exec}

    @property
    def links(self) -> dict[RemoteFd, str]:
        """Descriptor -> what /proc/PID/fd shows of it."""
        return {fd: one.raw.link for fd, one in self.tables.seen_of(self.pid).items()}

    @property
    def alone(self) -> dict[RemoteFd, OpenFile]:
        """Descriptor -> its description as this process's fdinfo shows it, as if not shared."""
        return {fd: one.file for fd, one in self.tables.seen_of(self.pid).items()}

    @functools.cached_property
    def by_fd(self) -> dict[int, OpenFile]:
        """Descriptor number of this process -> description."""
        tables = self.tables
        return {fd: tables.files[tables.by_slot[self.pid, fd]] for fd in tables.seen_of(self.pid)}

    def is_unchanged(self, file: OpenFile) -> bool:
        """Tell whether all that was read of it is as it was when it was looked at."""
        return self.tables.is_unchanged(file)

    def same_inode(self, file: OpenFile) -> list[OpenFile]:
        """Return all descriptions of the file behind `file`, itself included, in their order."""
        return self.tables.by_inode[file.status.st_dev, file.status.st_ino]

    def is_written(self, file: OpenFile) -> bool:
        """Tell whether some description of the tree may write the file behind `file`."""
        return (file.status.st_dev, file.status.st_ino) in self.tables.written

    @property
    def links_elsewhere(self) -> dict[str, Pid]:
        """Pipe or socket -> a process outside the tree that has it open too."""
        return self.tables.links_elsewhere

    @contextlib.contextmanager
    def borrow(self, file: OpenFile) -> Iterator[Fd]:
        """Lend a descriptor of ours on the target's description; what is set there is set for it.

        Raises:
            TargetGone: the process ended.
            OSError: EBADF, the descriptor was closed meanwhile.
        """
        pidfd = pidfd_open(file.pid)
        try:
            fd = pidfd_getfd(pidfd, file.fd, pid=file.pid)
        finally:
            os.close(pidfd)
        try:
            yield fd
        finally:
            os.close(fd)
