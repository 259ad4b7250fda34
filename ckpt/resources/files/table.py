"""The descriptors of a process and the open file descriptions behind them.

`descriptions` shows what the image holds, `fd_table` how it is read, `placing` how it comes back.

Kernel: kcmp(2). The kinds name theirs.

Refused before the target is stopped: every description that no kind knows, and threads with a
descriptor table of their own.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs

from ckpt.errors import Finding, UnsupportedState, UsageError
from ckpt.kernel.features import Features
from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp
from ckpt.kernel.procfs.files import list_tids
from ckpt.process.clones import Common
from ckpt.process.pid_space import Numbers
from ckpt.process.remote import Reply
from ckpt.resources.base import (
    Capture,
    Later,
    Opening,
    Resource,
    RestoreOptions,
    Stage,
    Stopped,
    Target,
    Tree,
)
from ckpt.resources.files import external, instead, locks
from ckpt.resources.files.descriptions import Description, FdLocks, FdRecord, FilesRecord
from ckpt.resources.files.external import EXTERNAL
from ckpt.resources.files.fd_table import FdTable, FdTables
from ckpt.resources.files.kind import AnyKind
from ckpt.resources.files.kinds import classify
from ckpt.resources.files.open_file import LEASES, LINKS, OpenFile, Problem, Slot
from ckpt.resources.files.placing import Source, plan_sources, prepare, restore
from ckpt.units import Pid

_NAME = "files"
_NOW = "files now"


def look(target: Target) -> Iterator[Finding]:
    """Name every descriptor that cannot be captured."""
    yield from _iter_unshared(target.pid)
    looked: _Looked | None = target.tree.notes.get(_NAME)
    if looked is None:
        looked = _Looked(FdTables(target.tree.pids, running=True, tree=target.tree))
        target.tree.notes[_NAME] = looked
    table = FdTable(looked.tables, target.pid)
    found: dict[OpenFile, AnyKind] = {}
    for file in table.own_files:
        # One that was closed while we looked: the capture looks again.
        with contextlib.suppress(OSError):
            kind, problem = classify(file, table)
            if kind:
                found[file] = kind
            elif problem:
                yield _name_problem(file, problem)
    # The capture confirms each by all that fdinfo, link and stat say, and the sharing by kcmp.
    looked.tables.note_found(found)
    looked.kinds |= {(file.pid, file.fd): kind for file, kind in found.items()}


@attrs.define(slots=True, eq=False, repr=False)
class _Looked:
    """What was found before the tree was stopped."""

    tables: FdTables
    kinds: dict[Slot, AnyKind] = attrs.field(factory=dict)
    """By the first descriptor of a description."""


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
    table = FdTable(_read_tables(stopped.tree), stopped.pid)
    looked: _Looked | None = stopped.tree.notes.get(_NAME)
    stopped.notes[LINKS] = table.links
    kinds = _kinds_of(table, looked.kinds if looked else {})
    asked = [kind.ask(file) for kind, file in zip(kinds, table.own_files, strict=True)]
    replies = iter((yield [one for calls in asked for one in calls]))
    captures = [
        _Capturing(kind, file, [next(replies) for _ in calls])
        for kind, file, calls in zip(kinds, table.own_files, asked, strict=True)
    ]
    early = {
        one.file: one.kind.capture(one.file, table, one.replies)
        for one in captures
        if not one.kind.reads_nothing
    }
    return Later(lambda: _build(table, captures, early))


def _read_tables(tree: Tree) -> FdTables:
    """Return what all processes of the frozen tree have open; read once in a capture."""
    if tree.claim(_NOW):
        looked: _Looked | None = tree.notes.get(_NAME)
        read = tree.notes[_NOW] = FdTables(tree.pids, looked.tables if looked else None, tree=tree)
        tree.notes[LEASES] = any(locks.has_lease(file.info) for file in read.files)
    tables: FdTables = tree.notes[_NOW]
    return tables


@attrs.frozen(slots=True, eq=False, repr=False)
class _Capturing:
    """One description under way."""

    kind: AnyKind
    file: OpenFile
    replies: list[Reply]


def _build(
    table: FdTable, captures: Iterable[_Capturing], early: dict[OpenFile, Any]
) -> FilesRecord:
    number = table.tables.by_slot
    descriptions = tuple(
        Description(
            number[one.file.pid, one.file.fd],
            one.kind.name,
            one.file.flags,
            early[one.file]
            if one.file in early
            else one.kind.capture(one.file, table, one.replies),
        )
        for one in captures
    )
    fds = tuple(_iter_fds(table))
    return FilesRecord(descriptions, fds, tuple(_iter_locks(table)))


def _kinds_of(table: FdTable, known: dict[Slot, AnyKind]) -> list[AnyKind]:
    kinds: list[AnyKind] = []
    findings: list[Finding] = []
    for file in table.own_files:
        kind, problem = _confirm(file, table, known.get((file.pid, file.fd)))
        if kind:
            kinds.append(kind)
        elif problem:
            findings.append(_name_problem(file, problem))
    if findings:
        raise UnsupportedState(table.pid, tuple(findings))
    return kinds


def _confirm(
    file: OpenFile, table: FdTable, known: AnyKind | None
) -> tuple[AnyKind | None, Problem | None]:
    """Return what `classify` does; of what has not changed no more is asked than needed."""
    if known is not None and table.is_unchanged(file):
        if known.reads_nothing:
            return known, None
        if known.is_kept and known.problem(file, table) is None:
            return known, None
    return classify(file, table)


def _iter_fds(table: FdTable) -> Iterator[FdRecord]:
    number, close_on_exec = table.tables.by_slot, table.close_on_exec
    for fd in sorted(table.links):
        yield FdRecord(fd, number[table.pid, fd], close_on_exec=fd in close_on_exec)


def _iter_locks(table: FdTable) -> Iterator[FdLocks]:
    """Yield the locks of the process, and of the descriptions that are in its record.

    The kernel shows the former only to whom they belong.
    """
    number = table.tables.by_slot
    own = {(file.pid, file.fd) for file in table.own_files}
    seen: set[int] = set()
    for fd, file in sorted(table.alone.items()):
        description = number[table.pid, fd]
        if file.info.locks and description not in seen:
            held = locks.capture(file)
            if (table.pid, fd) not in own:
                held = tuple(lock for lock in held if lock.is_of_process)
            if held:
                yield FdLocks(fd, held)
        seen.add(description)


def settle(record: FilesRecord) -> FilesRecord:
    """Complete the records of the kinds."""
    return attrs.evolve(record, descriptions=tuple(map(_settled, record.descriptions)))


def _settled(description: Description) -> Description:
    settled = description.behaviour.settle(description.record)
    return attrs.evolve(description, record=settled)


def renumber(record: FilesRecord, numbers: Numbers) -> FilesRecord:
    """Put the tree's own numbers into the records of the kinds."""
    descriptions = tuple(
        attrs.evolve(one, record=one.behaviour.renumber(one.record, numbers))
        for one in record.descriptions
    )
    return attrs.evolve(record, descriptions=descriptions)


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
    for description in record.descriptions:
        problems = description.behaviour.check_host(description.record)
        yield from _findings(record, description, problems)


def expect(record: FilesRecord, opening: Opening) -> None:
    """Let nobody hear of a description before it is there."""
    for description in record.descriptions:
        description.behaviour.expect(description.record, opening)


def _findings(
    record: FilesRecord, description: Description, problems: Iterable[Problem]
) -> Iterator[Finding]:
    for problem in problems:
        subject = f"fd {record.first_fds()[description.id]} ({description.name})"
        yield Finding(subject, problem.text, problem.remedy, problem.wants_address)


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
    sources = plan_sources(record, options)
    by_description: dict[int, list[Source]] = {}
    for source in sources:
        by_description.setdefault(source.description.id, []).append(source)
    for description in record.descriptions:
        own = by_description.get(description.id)
        if own:
            yield from _findings(record, description, _iter_problems(description, own, options))
            if options.original_stands:
                held = _locks_of(record, description)
                yield from _findings(record, description, locks.find_held(held, description.name))


def _locks_of(record: FilesRecord, description: Description) -> Iterator[locks.LockRecord]:
    fds = {entry.fd for entry in record.fds if entry.description == description.id}
    for one in record.locks:
        if one.fd in fds:
            yield from one.locks


def _iter_problems(
    description: Description, sources: list[Source], options: RestoreOptions
) -> Iterator[Problem]:
    for source in sources:
        if source.instead is not None:
            problem = instead.find_problem(source.instead, str(source.asked_by), description.flags)
        elif description.kind == EXTERNAL.name:
            problem = external.check_stream(
                description.record, source.stream, description.flags, options
            )
        else:
            yield from description.behaviour.check_files(
                description.record, description.flags, options
            )
            continue
        if problem:
            yield problem


def _once(warn: Callable[[str], None]) -> Callable[[str], None]:
    said: set[str] = set()

    def warn_once(text: str) -> None:
        if text not in said:
            said.add(text)
            warn(text)

    return warn_once


FILES = Resource(
    "files",
    FilesRecord,
    Stage.FILES,
    capture=capture,
    restore=restore,
    common=Common.FILES,
    look=look,
    settle=settle,
    renumber=renumber,
    check_host=check_host,
    check_files=check_files,
    expect=expect,
    prepare=prepare,
)
