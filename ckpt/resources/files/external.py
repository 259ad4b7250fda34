"""Standard streams that lead out of the process: a terminal, a pipe of a shell, a socket.

    description of fds 0, 1, 2, 10 (a terminal)  ->  0, 1, 2: the restorer's own 0, 1, 2
                                                     10: one that it may read or write as before

Nothing of the object is captured. A restore puts the restorer's own standard stream of the same
number there, and says so, or what `--inherit` names (`instead`). What the descriptions shared
(offset, status flags) they share no more, if they were one for several of the three numbers.

A description that is none of 0, 1, 2, but of the same terminal or pipe as one of them (it was
opened by /dev/stdout, say), goes with it. Everything else from outside is refused before the
target is stopped, unless the user declares it (`outside`).
"""

import os
import stat

import attrs

from ckpt.process.remote import Reply
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.files import instead
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind
from ckpt.resources.files.open_file import STANDARD_STREAMS, OpenFile, Problem
from ckpt.units import Fd

NAMES = {0: "standard input", 1: "standard output", 2: "standard error"}


@attrs.frozen(slots=True, repr=False)
class ExternalRecord:
    """A standard stream."""

    stream: int
    """Which stream of the restorer its other descriptors get; 0, 1 and 2 get their own."""
    was: str
    """What /proc showed: `/dev/pts/3`, `pipe:[4711]`."""
    streams: tuple[int, ...]
    """All that are needed: `stream`, and those that it is in some process; ascending."""

    def __attrs_post_init__(self) -> None:
        """Refuse what is no standard stream."""
        if not set(STANDARD_STREAMS).issuperset(self.streams) or self.stream not in self.streams:
            raise ValueError(f"{self.stream}, {self.streams}: no standard streams")


def matches(file: OpenFile) -> bool:
    """Tell whether it is such that, as a standard stream, ours can stand for it."""
    mode = file.status.st_mode
    of_kind = stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
    return of_kind and not file.path_only


def stream_of(file: OpenFile, table: FdTable) -> int | None:
    """Return which standard stream stands for a description; None if it is none."""
    own = _streams_among(file)
    if not own:
        same = (other for other in table.same_inode(file) if other.link == file.link)
        own = [fd for other in same for fd in _streams_among(other)]
    if not own:
        return None
    writable = [stream for stream in own if stream] if file.writable else []
    return (writable or own)[0]


def _streams_among(file: OpenFile) -> list[int]:
    return sorted({int(fd) for _, fd in file.slots if fd in STANDARD_STREAMS})


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> ExternalRecord:
    """See `Kind.capture`."""
    stream = stream_of(file, table)
    assert stream is not None
    streams = sorted({stream, *_streams_among(file)})
    return ExternalRecord(stream, file.link, tuple(streams))


def check_stream(
    record: ExternalRecord, stream: int, flags: int, options: RestoreOptions
) -> Problem | None:
    """Tell why what stands for it cannot: our own standard stream, or what the user has named."""
    chosen = instead.choose(options.external, record.was, flags)
    if chosen is not None:
        return instead.find_problem(chosen, record.was, flags)
    try:
        os.fstat(stream)
    except OSError:
        remedy = f"open {NAMES[stream]}, or --inherit {stream}=PATH"
        return Problem(f"was {record.was}, and {NAMES[stream]} of this command is closed", remedy)
    return None


def open_stream(record: ExternalRecord, stream: int, flags: int, opening: Opening) -> Fd:
    """Return a descriptor on what stands for it, blocking or not as the process had it."""
    chosen = instead.choose(opening.options.external, record.was, flags)
    if chosen is not None:
        return instead.take(chosen, stream, flags)
    opening.options.warn(
        f"fd {stream} was {record.was} outside the process, and is {NAMES[stream]} of this"
        " command now"
    )
    return instead.lend(stream, flags)


def _open_own(record: ExternalRecord, flags: int, opening: Opening) -> Fd:
    return open_stream(record, record.stream, flags, opening)


EXTERNAL = Kind("external", ExternalRecord, matches=matches, capture=capture, open=_open_own)
