"""The descriptors of a process and the open file descriptions behind them.

    fds            descriptions
    0 ──────────> [0] external, standard input
    1 ──────────> [1] regular, /var/log/x
    2 ─────────┘                                  2 and 1 share offset and flags
    7 cloexec ──> [2] pipe 4711, read end

Each description is opened once, in the restorer, and inherited; inside the process dup3 puts it
under its numbers, everything else is closed, and the kinds that need it get their last touch.

Kernel: dup3(2), close_range(2) (5.9), kcmp(2). The kinds name theirs.

Refused before the target is stopped: every description that no kind knows, and threads with a
descriptor table of their own.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs

from ckpt.errors import Finding, RestoreFailed, UnsupportedState, UsageError
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features
from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp
from ckpt.kernel.procfs.files import list_tids
from ckpt.process.remote import Call, Reply, call
from ckpt.resources.base import (
    Capture,
    Later,
    Opened,
    Rebuilt,
    Resource,
    Restore,
    RestoreOptions,
    Stage,
    Stopped,
    Target,
    expect,
)
from ckpt.resources.files import external, locks
from ckpt.resources.files.epoll import EpollRecord
from ckpt.resources.files.external import EXTERNAL, ExternalRecord
from ckpt.resources.files.kind import AnyKind, Attaching, Opening
from ckpt.resources.files.kinds import BY_NAME, classify
from ckpt.resources.files.locks import LockRecord
from ckpt.resources.files.open_file import LINKS, STANDARD_STREAMS, FdTable, OpenFile, Problem
from ckpt.resources.plain import strict, structure
from ckpt.units import Fd, Pid, RemoteFd

_NAME = "files"
_MAX_FD = 2**31 - 1
_OTHER_FILES = 256
"""More than a restore has open besides."""
_LAST = 2**32 - 1
"""For close_range: up to the highest."""


@attrs.frozen(slots=True, repr=False)
class Description:
    """One open file description."""

    kind: str
    flags: int
    """Access mode and status flags of open(2)."""
    record: Any
    """The record of its kind; given as plain values (from an image) it is made one."""
    locks: tuple[LockRecord, ...] = ()
    """Those that are held through it."""

    def __attrs_post_init__(self) -> None:
        """Refuse an unknown kind; turn plain values into the kind's record."""
        if self.kind not in BY_NAME:
            raise ValueError(f"unknown kind of file {self.kind!r}")
        record = BY_NAME[self.kind].record
        if not isinstance(self.record, record):
            object.__setattr__(self, "record", structure(strict(self.record, dict), record))

    @property
    def behaviour(self) -> AnyKind:
        """What can be done with it."""
        return BY_NAME[self.kind]

    @property
    def name(self) -> str:
        """What a user calls it."""
        record = self.record
        if isinstance(record, ExternalRecord):
            return record.was
        file = getattr(record, "file", None)
        return str(file.path if file else getattr(record, "path", self.kind))


@attrs.frozen(slots=True, repr=False)
class FdRecord:
    """One descriptor."""

    fd: int
    description: int
    """Index into `FilesRecord.descriptions`."""
    close_on_exec: bool


@attrs.frozen(slots=True, repr=False)
class FilesRecord:
    """All that a process has open."""

    descriptions: tuple[Description, ...]
    fds: tuple[FdRecord, ...]
    """Ascending."""

    def __attrs_post_init__(self) -> None:
        """Refuse numbers that cannot be."""
        numbers = [entry.fd for entry in self.fds]
        if numbers != sorted(set(numbers)) or (numbers and not 0 <= numbers[0] <= numbers[-1]):
            raise ValueError("descriptors are not ascending")
        if self.highest_fd > _MAX_FD:
            raise ValueError(f"descriptor {self.highest_fd} cannot be")
        used = {entry.description for entry in self.fds}
        if used != set(range(len(self.descriptions))):
            raise ValueError("descriptors and descriptions do not belong together")

    @property
    def highest_fd(self) -> int:
        """The highest descriptor; -1 if there is none."""
        return self.fds[-1].fd if self.fds else -1

    def fds_of(self, index: int) -> list[int]:
        """Return the descriptors of a description, ascending."""
        return [entry.fd for entry in self.fds if entry.description == index]


def look(target: Target) -> Iterator[Finding]:
    """Name every descriptor that cannot be captured."""
    yield from _iter_unshared(target.pid)
    with FdTable(target.pid, running=True) as table:
        found: dict[OpenFile, AnyKind] = {}
        for file in table.files:
            # One that was closed while we looked: the capture looks again.
            with contextlib.suppress(OSError):
                kind, problem = classify(file, table)
                if kind:
                    found[file] = kind
                elif problem:
                    yield _name_problem(file, problem)
        # The capture confirms each by all that fdinfo, link and stat say, and the sharing by kcmp.
        table.note_found(found)
        kinds = {fd: kind for file, kind in found.items() for fd in file.fds}
        target.notes[_NAME] = _Looked(table, kinds)


@attrs.frozen(slots=True, eq=False, repr=False)
class _Looked:
    """What was found before the process was stopped."""

    table: FdTable
    kinds: dict[RemoteFd, AnyKind]


def _name_problem(file: OpenFile, problem: Problem) -> Finding:
    return Finding(f"fd {file.fd} ({file.link})", problem.text, problem.remedy)


def _iter_unshared(pid: Pid) -> Iterator[Finding]:
    for tid in list_tids(pid):
        if int(tid) != int(pid) and kcmp(pid, tid, KcmpType.FILES) is not Ordering.EQUAL:
            yield Finding(f"thread {tid}", "has descriptors of its own, which is not supported yet")


def capture(stopped: Stopped) -> Capture[FilesRecord]:
    """Read what is open; what is not as it was is asked anew whether it can be captured.

    Raises:
        UnsupportedState: something was opened after `look`.
    """
    looked: _Looked | None = stopped.notes.get(_NAME)
    with FdTable(stopped.pid, looked.table if looked else None) as table:
        stopped.notes[LINKS] = table.links
        kinds = _kinds_of(table, looked.kinds if looked else {})
        asked = [kind.ask(file) for kind, file in zip(kinds, table.files, strict=True)]
        replies = iter((yield [one for calls in asked for one in calls]))
        captures = [
            _Capturing(kind, file, [next(replies) for _ in calls])
            for kind, file, calls in zip(kinds, table.files, asked, strict=True)
        ]
        early = {
            one.file: one.kind.capture(one.file, table, one.replies)
            for one in captures
            if not one.kind.reads_nothing
        }
    return Later(lambda: _build(table, captures, early))


@attrs.frozen(slots=True, eq=False, repr=False)
class _Capturing:
    """One description under way."""

    kind: AnyKind
    file: OpenFile
    replies: list[Reply]


def _build(
    table: FdTable, captures: Iterable[_Capturing], early: dict[OpenFile, Any]
) -> FilesRecord:
    table.survey.close()
    descriptions = tuple(
        Description(
            one.kind.name,
            one.file.flags,
            early[one.file]
            if one.file in early
            else one.kind.capture(one.file, table, one.replies),
            locks.capture(one.file),
        )
        for one in captures
    )
    return FilesRecord(descriptions, tuple(_iter_fds(table)))


def _kinds_of(table: FdTable, known: dict[RemoteFd, AnyKind]) -> list[AnyKind]:
    kinds: list[AnyKind] = []
    findings: list[Finding] = []
    for file in table.files:
        kind, problem = known.get(file.fd), None
        if kind is None or not kind.reads_nothing or not table.is_unchanged(file):
            kind, problem = classify(file, table)
        if kind:
            kinds.append(kind)
        elif problem:
            findings.append(_name_problem(file, problem))
    if findings:
        raise UnsupportedState(table.pid, tuple(findings))
    return kinds


def _iter_fds(table: FdTable) -> Iterator[FdRecord]:
    index = {file.fd: number for number, file in enumerate(table.files)}
    close_on_exec = table.close_on_exec
    for fd, file in sorted(table.by_fd.items()):
        yield FdRecord(fd, index[file.fd], close_on_exec=fd in close_on_exec)


def settle(record: FilesRecord) -> FilesRecord:
    """Complete the records of the kinds."""
    return attrs.evolve(record, descriptions=tuple(map(_settled, record.descriptions)))


def _settled(description: Description) -> Description:
    settled = description.behaviour.settle(description.record)
    return attrs.evolve(description, record=settled)


def check_host(record: FilesRecord, _features: Features) -> Iterator[Finding]:
    """Name what this host does not let the process have."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and record.highest_fd >= hard:
        yield Finding(
            f"fd {record.highest_fd}",
            f"this host allows {hard} open files at most",
            "raise the hard limit of open files (ulimit -Hn)",
        )
    for index, description in enumerate(record.descriptions):
        problems = description.behaviour.check_host(description.record)
        yield from _findings(record, index, problems)


def _findings(record: FilesRecord, index: int, problems: Iterable[Problem]) -> Iterator[Finding]:
    description = record.descriptions[index]
    subject = f"fd {record.fds_of(index)[0]} ({description.name})"
    return (Finding(subject, problem.text, problem.remedy) for problem in problems)


def check_files(record: FilesRecord, options: RestoreOptions) -> Iterator[Finding]:
    """Name files that are missing or not what they were, and standard streams that are closed.

    Raises:
        UsageError: `--inherit` names a descriptor that the process does not have, or names one
            description by two descriptors with different paths.
    """
    absent = options.inherit.keys() - {entry.fd for entry in record.fds}
    if absent:
        raise UsageError(f"--inherit {min(absent)}: the process had no such descriptor open")
    options = attrs.evolve(options, warn=_once(options.warn))
    sources = _plan_sources(record, options)
    for index, description in enumerate(record.descriptions):
        own = [source for source in sources if source.index == index and not source.path]
        if own:
            yield from _findings(record, index, _iter_problems(description, own, options))


def _iter_problems(
    description: Description, sources: list["_Source"], options: RestoreOptions
) -> Iterator[Problem]:
    if description.kind != EXTERNAL.name:
        yield from description.behaviour.check_files(description.record, description.flags, options)
        return
    for source in sources:
        problem = external.check_stream(description.record, source.stream)
        if problem:
            yield problem


def _once(warn: Callable[[str], None]) -> Callable[[str], None]:
    said: set[str] = set()

    def warn_once(text: str) -> None:
        if text not in said:
            said.add(text)
            warn(text)

    return warn_once


@attrs.frozen(slots=True, repr=False)
class _Source:
    """Something that the restorer opens: for a description, or for one standard stream of it."""

    index: int
    """Of the description."""
    stream: int
    """Which standard stream; -1 for what is none."""
    path: str = ""
    """What to open instead of what it was."""
    asked_by: int = -1
    """The descriptor that `--inherit` named."""

    @property
    def key(self) -> str:
        """Its key among what is inherited."""
        key = f"file {self.index}" + (f" stream {self.stream}" if self.stream >= 0 else "")
        return key + _INSTEAD * bool(self.path)


_INSTEAD = " replaced"


def _plan_source(record: FilesRecord, entry: FdRecord) -> _Source:
    """Return from which source a descriptor comes, if the user does not want another."""
    description = record.descriptions[entry.description]
    if not isinstance(description.record, ExternalRecord):
        return _Source(entry.description, -1)
    stream = entry.fd if entry.fd in STANDARD_STREAMS else description.record.stream
    return _Source(entry.description, stream)


def _plan_sources(record: FilesRecord, options: RestoreOptions) -> list[_Source]:
    """Return everything that must be opened, each once.

    Raises:
        UsageError: two of `--inherit` name one description and differ.
    """
    sources: dict[str, _Source] = {}
    for entry in record.fds:
        source = _plan_source(record, entry)
        sources.setdefault(source.key, source)
        path = options.inherit.get(entry.fd)
        if path is None:
            continue
        other = sources[source.key]
        if other.path not in ("", path):
            raise UsageError(f"--inherit {other.asked_by} and {entry.fd} are one open file")
        sources[source.key] = attrs.evolve(source, path=path, asked_by=entry.fd)
    return list(sources.values())


def prepare(record: FilesRecord, options: RestoreOptions) -> dict[str, Opened]:
    """Open every description once, for the embryo to inherit.

    Raises:
        RestoreFailed: one of them cannot be opened; none is left open.
    """
    opened: dict[str, Opened] = {}
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as helpers:
        opening = Opening(options, helpers)
        sources = _plan_sources(record, options)
        _make_room(len(sources))
        for source in sources:
            fd = _open(record.descriptions[source.index], source, opening)
            undo.callback(os.close, fd)
            opened[source.key] = Opened(fd)
        undo.pop_all()
    return opened


def _make_room(n_files: int) -> None:
    """Raise our own soft limit of open files, as far as the hard one lets us."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = min(n_files + _OTHER_FILES, hard)
    if need > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def _open(description: Description, source: _Source, opening: Opening) -> Fd:
    try:
        if source.path:
            return external.open_instead(source.path, source.asked_by, description.flags)
        if source.stream >= 0:
            return external.open_stream(
                description.record, source.stream, description.flags, opening
            )
        return description.behaviour.open(description.record, description.flags, opening)
    except OSError as error:
        name = source.path or description.name
        raise RestoreFailed(f"opening {name}", error.strerror or str(error)) from error


def restore(record: FilesRecord, rebuilt: Rebuilt) -> Restore:
    """Put everything under its number, close the rest, and finish what needs the numbers."""
    expect("placing descriptors", (yield [_place(record, entry, rebuilt) for entry in record.fds]))
    expect("closing descriptors", (yield list(_iter_closing(record))))
    attaching = Attaching(rebuilt, frozenset(_iter_replaced(record, rebuilt)))
    for index in _plan_attaching(record):
        description = record.descriptions[index]
        attach = description.behaviour.attach
        if attach:
            fd = RemoteFd(record.fds_of(index)[0])
            yield from attach(description.record, fd, attaching)
    yield from _restore_locks(record, attaching)


def _restore_locks(record: FilesRecord, attaching: Attaching) -> Restore:
    """Take all locks, now that no close in the process can drop them."""
    for index, description in enumerate(record.descriptions):
        fd = record.fds_of(index)[0]
        if not description.locks:
            continue
        if fd in attaching.replaced_fds:
            attaching.rebuilt.warn(f"fd {fd} is another file now, on which nothing is locked")
            continue
        yield from locks.restore(description.locks, RemoteFd(fd), description.name)


def _place(record: FilesRecord, entry: FdRecord, rebuilt: Rebuilt) -> Call:
    key = _plan_source(record, entry).key
    inherited = rebuilt.inherited
    source = inherited[key] if key in inherited else inherited[key + _INSTEAD]
    return call(NR.dup3, source, entry.fd, os.O_CLOEXEC if entry.close_on_exec else 0)


def _iter_closing(record: FilesRecord) -> Iterator[Call]:
    """Close every number between and above those that are in use."""
    start = 0
    for entry in record.fds:
        if entry.fd > start:
            yield call(NR.close_range, start, entry.fd - 1, 0)
        start = entry.fd + 1
    yield call(NR.close_range, start, _LAST, 0)


def _iter_replaced(record: FilesRecord, rebuilt: Rebuilt) -> Iterator[int]:
    """Yield the descriptors that are not what they were."""
    for entry in record.fds:
        source = _plan_source(record, entry)
        if source.stream >= 0 or source.key not in rebuilt.inherited:
            yield entry.fd


def _plan_attaching(record: FilesRecord) -> list[int]:
    """Return all descriptions, an epoll behind those that it watches."""
    place = {entry.fd: entry.description for entry in record.fds}
    watched = {
        index: {place[item.fd] for item in description.record.items if item.fd in place}
        for index, description in enumerate(record.descriptions)
        if isinstance(description.record, EpollRecord)
    }
    order = [index for index in range(len(record.descriptions)) if index not in watched]
    while watched:
        inner = [index for index, others in watched.items() if not others & watched.keys()]
        # A circle there cannot be; the kernel will refuse it.
        for index in inner or list(watched):
            del watched[index]
            order.append(index)
    return order


FILES = Resource(
    "files",
    FilesRecord,
    Stage.FILES,
    capture=capture,
    restore=restore,
    look=look,
    settle=settle,
    check_host=check_host,
    check_files=check_files,
    prepare=prepare,
)
