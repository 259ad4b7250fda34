"""Standard streams that lead out of the process: a terminal, a pipe of a shell, a socket.

    description of fds 0, 1, 2, 10 (a terminal)  ->  0, 1, 2: the restorer's own 0, 1, 2
                                                     10: one that it may read or write as before

Nothing of the object is captured. A restore puts the restorer's own standard stream of the same
number there, or what `--inherit FD=PATH` names, and says so. What the descriptions shared (offset,
status flags) they share no more, if they were one for several of the three numbers.

A description that is none of 0, 1, 2, but of the same terminal or pipe as one of them (it was
opened by /dev/stdout, say), goes with it. Everything else from outside is refused before the
target is stopped.
"""

import contextlib
import fcntl
import os
import stat

import attrs

from ckpt.process.remote import Reply
from ckpt.resources.base import Opening
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, duplicate, set_status_flags
from ckpt.resources.files.open_file import STANDARD_STREAMS, OpenFile, Problem, may_write
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


def check_stream(record: ExternalRecord, stream: int) -> Problem | None:
    """Tell why our own standard stream cannot stand there."""
    try:
        os.fstat(stream)
    except OSError:
        remedy = f"open {NAMES[stream]}, or --inherit {stream}=PATH"
        return Problem(f"was {record.was}, and {NAMES[stream]} of this command is closed", remedy)
    return None


def open_stream(record: ExternalRecord, stream: int, flags: int, opening: Opening) -> Fd:
    """Return a descriptor on our own standard stream, blocking or not as the process had it."""
    opening.options.warn(
        f"fd {stream} was {record.was} outside the process, and is {NAMES[stream]} of this"
        " command now"
    )
    ours = fcntl.fcntl(stream, fcntl.F_GETFL)
    if (ours ^ flags) & os.O_NONBLOCK:
        try:
            return _reopen(stream, ours, flags)
        except OSError:
            # A socket, or not ours to open: then whoever shares it has to bear the change.
            fd = duplicate(stream)
            set_status_flags(fd, ours & ~os.O_NONBLOCK | flags & os.O_NONBLOCK)
            return fd
    return duplicate(stream)


def _reopen(stream: int, ours: int, flags: int) -> Fd:
    """Open the terminal or pipe once more, so that O_NONBLOCK is not set for our caller too."""
    mode = os.stat(stream).st_mode
    if not stat.S_ISCHR(mode) and not stat.S_ISFIFO(mode):
        raise OSError("a file would have another offset")
    keep = ours & (os.O_ACCMODE | os.O_APPEND) | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = Fd(os.open(f"/proc/self/fd/{stream}", keep))
    set_status_flags(fd, ours & ~os.O_NONBLOCK | flags & os.O_NONBLOCK)
    return fd


def open_instead(path: str, fd: int, flags: int) -> Fd:
    """Open `path` as the user wants it in place of descriptor `fd`, as a shell would redirect.

    What is written goes to the end of a file that exists; what is read is read from its start.
    """
    writable = may_write(flags)
    wanted = flags & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK) | os.O_NOCTTY | os.O_CLOEXEC
    opened = Fd(os.open(path, wanted | (os.O_CREAT if writable else 0), 0o666))
    if writable and fd != 0:
        with contextlib.suppress(OSError):
            os.lseek(opened, 0, os.SEEK_END)
    return opened


def _open_own(record: ExternalRecord, flags: int, opening: Opening) -> Fd:
    return open_stream(record, record.stream, flags, opening)


EXTERNAL = Kind("external", ExternalRecord, matches=matches, capture=capture, open=_open_own)
