"""Opening the descriptions of an image in the restorer, and putting them under their numbers.

Each description is opened once, in the restorer, and inherited by all processes; inside of each
dup3 puts it under its numbers, everything else is closed, and the kinds that need it get their last
touch. Last come the locks: any close of the file by the process would drop them.

Kernel: dup3(2), close_range(2) (5.9). The kinds name theirs.
"""

import contextlib
import os
from collections.abc import Container, Iterator

import attrs

from ckpt.errors import RestoreFailed, UsageError
from ckpt.kernel.arch import NR
from ckpt.process.remote import Call, call
from ckpt.resources.base import Instead, Opened, Opening, Rebuilt, Restore, RestoreOptions, expect
from ckpt.resources.files import external, instead, late, locks
from ckpt.resources.files.descriptions import Description, FdRecord, FilesRecord
from ckpt.resources.files.epoll import EpollRecord
from ckpt.resources.files.external import ExternalRecord
from ckpt.resources.files.kind import Attaching
from ckpt.resources.files.outside import OUTSIDE
from ckpt.units import Fd, RemoteFd

_OTHER_FILES = 256
"""More than a restore has open besides."""
_LAST = 2**32 - 1
"""For close_range: up to the highest."""


@attrs.frozen(slots=True, repr=False)
class Source:
    """Something that the restorer opens: for a description, or for one standard stream of it."""

    description: Description
    stream: int
    """Which standard stream; -1 for what is none."""
    instead: Instead | None = None
    """What takes its place, by the number that it had."""
    asked_by: int = -1
    """The descriptor that `--inherit` named."""

    @property
    def key(self) -> str:
        """Its key among what is inherited."""
        return _key(self.description.id, self.stream) + _INSTEAD * self.is_another

    @property
    def is_another(self) -> bool:
        """Tell whether the user has named what it is now."""
        return self.instead is not None or self.description.kind == OUTSIDE.name


_INSTEAD = " replaced"


def _key(description: int, stream: int) -> str:
    return f"file {description}" + (f" stream {stream}" if stream >= 0 else "")


def _find_source(entry: FdRecord, inherited: Container[str]) -> str:
    """Return the key of what comes to a descriptor.

    Raises:
        RestoreFailed: nothing was opened for it.
    """
    # What is no standard stream goes where it could write, if it could.
    for stream in (-1, entry.fd, 1, 2, 0):
        for key in (_key(entry.description, stream), _key(entry.description, stream) + _INSTEAD):
            if key in inherited:
                return key
    raise RestoreFailed(
        f"opening descriptor {entry.fd}", f"the image has no description {entry.description}"
    )


def _iter_own_sources(description: Description) -> Iterator[Source]:
    """Yield what a description comes from, if the user does not want another."""
    record = description.record
    streams = record.streams if isinstance(record, ExternalRecord) else (-1,)
    return (Source(description, stream) for stream in streams)


def plan_sources(record: FilesRecord, options: RestoreOptions) -> list[Source]:
    """Return everything that must be opened for the descriptions of a process, each once.

    Raises:
        UsageError: two of `--inherit` name one description and differ.
    """
    place = {entry.fd: entry.description for entry in record.fds}
    sources: dict[str, Source] = {}
    for description in record.descriptions:
        for source in _iter_own_sources(description):
            sources[source.key] = source
    for fd, chosen in options.inherit.items():
        if place.get(fd) not in {one.id for one in record.descriptions}:
            continue
        key = _find_source(FdRecord(fd, place[fd], close_on_exec=False), sources)
        other = sources[key]
        if other.instead not in (None, chosen):
            raise UsageError(f"--inherit {other.asked_by} and {fd} are one open file")
        sources[key] = attrs.evolve(other, instead=chosen, asked_by=fd)
    return list(sources.values())


def prepare(record: FilesRecord, opening: Opening) -> dict[str, Opened]:
    """Open every description once, for the whole tree to inherit.

    Raises:
        RestoreFailed: one of them cannot be opened; none is left open.
    """
    opened: dict[str, Opened] = {}
    with contextlib.ExitStack() as undo:
        sources = plan_sources(record, opening.options)
        _make_room(len(sources))
        for source in sources:
            fd = _open(source, opening)
            undo.callback(os.close, fd)
            opened[source.key] = Opened(fd, shared=True)
        undo.pop_all()
    return opened


def _make_room(n_files: int) -> None:
    """Raise our own soft limit of open files, as far as the hard one lets us."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = min(n_files + _OTHER_FILES, hard)
    if need > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def _open(source: Source, opening: Opening) -> Fd:
    description = source.description
    try:
        if source.instead is not None:
            return instead.take(source.instead, source.asked_by, description.flags)
        if source.stream >= 0:
            return external.open_stream(
                description.record, source.stream, description.flags, opening
            )
        return description.behaviour.open(description.record, description.flags, opening)
    except OSError as error:
        name = description.name if source.instead is None else str(source.instead)
        raise RestoreFailed(f"opening {name}", error.strerror or str(error)) from error


def restore(record: FilesRecord, rebuilt: Rebuilt) -> Restore:
    """Put everything under its number, close the rest, and finish what needs the numbers."""
    expect("placing descriptors", (yield [_place(entry, rebuilt) for entry in record.fds]))
    expect("closing descriptors", (yield list(_iter_closing(record))))
    yield from late.bring_in(rebuilt)
    attaching = Attaching(rebuilt, frozenset(_iter_replaced(record, rebuilt)))
    first_fds = record.first_fds()
    for description in _plan_attaching(record):
        attach = description.behaviour.attach
        if attach:
            fd = RemoteFd(first_fds[description.id])
            yield from attach(description.record, fd, attaching)
    yield from _restore_locks(record, attaching)


def _restore_locks(record: FilesRecord, attaching: Attaching) -> Restore:
    """Take all locks, now that no close in the process can drop them."""
    by_id = {one.id: one.name for one in record.descriptions}
    names = {
        entry.fd: by_id[entry.description] for entry in record.fds if entry.description in by_id
    }
    for held in record.locks:
        if held.fd in attaching.replaced_fds:
            attaching.rebuilt.warn(f"fd {held.fd} is another file now, on which nothing is locked")
            continue
        yield from locks.restore(held.locks, RemoteFd(held.fd), names.get(held.fd, f"fd {held.fd}"))


def _place(entry: FdRecord, rebuilt: Rebuilt) -> Call:
    source = rebuilt.inherited[_find_source(entry, rebuilt.inherited)]
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
        if _find_source(entry, rebuilt.inherited) != _key(entry.description, -1):
            yield entry.fd


def _plan_attaching(record: FilesRecord) -> list[Description]:
    """Return all descriptions, an epoll behind those that it watches."""
    place = {entry.fd: entry.description for entry in record.fds}
    watched = {
        one.id: {place[item.fd] for item in one.record.items if item.fd in place}
        for one in record.descriptions
        if isinstance(one.record, EpollRecord)
    }
    order = [one.id for one in record.descriptions if one.id not in watched]
    while watched:
        inner = [number for number, others in watched.items() if not others & watched.keys()]
        # A circle there cannot be; the kernel will refuse it.
        for number in inner or list(watched):
            del watched[number]
            order.append(number)
    numbered = {one.id: one for one in record.descriptions}
    return [numbered[number] for number in order]
