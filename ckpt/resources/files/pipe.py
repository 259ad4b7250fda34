"""Pipes that nobody outside the process has a part in: both ends, or the last end that is left.

    description 3 (read)  ──┐                       content: what was written and not yet read,
    description 5 (read)  ──┤  pipe 4711 [########]  copied by tee(2) into a pipe of ours of the
    description 4 (write) ──┘                        same size: nothing is taken out

A further description of an end comes from opening /proc/self/fd/N; both kinds are told apart by
O_LARGEFILE, which open(2) sets and pipe(2) does not.

Kernel: pipe(7), tee(2), fcntl(2) F_GETPIPE_SZ and F_SETPIPE_SZ, poll(2) for ends without partner.

Refused before the target is stopped: pipes that another process has open too, unless they are
standard streams (`external`) or the user declares them (`outside`). Named pipes are in `fifo`. What
is left in a pipe that has only write ends is not kept: nobody can read it. In packet mode
(O_DIRECT) every packet stays one; bytes that were written without it into the same pipe are cut as
a reader would have got them.
"""

import contextlib
import fcntl
import os
import select
import stat
import struct
import termios
from collections.abc import Iterator

import attrs

from ckpt.errors import HostFull
from ckpt.kernel.tee import tee
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, duplicate, flags_for_open, set_status_flags
from ckpt.resources.files.open_file import (
    O_LARGEFILE,
    OpenFile,
    Problem,
    may_write,
    outside_problem,
)
from ckpt.units import Fd

_DEFAULT_BYTES = 65536
_MAX_BYTES = 1 << 31
"""F_SETPIPE_SZ takes no more."""


@attrs.frozen(slots=True, repr=False)
class PipeRecord:
    """One end of a pipe. The first end of each pipe tells what is in it, the others nothing."""

    pipe: int
    """Its inode number: ends with the same number belong together."""
    capacity_bytes: int
    """0 if another end tells."""
    packets: bool
    """Each element of `content` is a packet, to be read by one read."""
    content: tuple[bytes, ...]

    def __attrs_post_init__(self) -> None:
        """Refuse what no pipe can be."""
        if not 0 <= self.capacity_bytes <= _MAX_BYTES:
            raise ValueError(f"a pipe cannot hold {self.capacity_bytes} bytes")


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return stat.S_ISFIFO(file.status.st_mode) and file.link.startswith("pipe:")


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    ends = table.same_inode(file)
    has_reader = any(end.readable for end in ends)
    has_writer = any(end.writable for end in ends)
    if has_reader and has_writer:
        holder = table.links_elsewhere.get(file.link) if table.running else None
        if holder is not None:
            return outside_problem(file.link, f"is a pipe that process {holder} has open too")
        return None
    if _has_partner(file, table):
        return outside_problem(file.link, "is a pipe whose other end is in another process")
    return None


def _has_partner(file: OpenFile, table: FdTable) -> bool:
    """Tell whether an end, the only one in the process, has the other one somewhere."""
    with table.borrow(file) as fd:
        poll = select.poll()
        poll.register(fd, 0)
        events = dict(poll.poll(0)).get(fd, 0)
    return not events & (select.POLLHUP if file.readable else select.POLLERR)


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> PipeRecord:
    """See `Kind.capture`."""
    ends = table.same_inode(file)
    number = file.status.st_ino
    if ends[0] is not file:
        return PipeRecord(number, 0, packets=False, content=())
    reader = next((end for end in ends if end.readable), None)
    with table.borrow(reader or file) as fd:
        capacity_bytes = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        content = tuple(iter_content(fd, capacity_bytes)) if reader else ()
    packets = len(content) > 1 or any(end.flags & os.O_DIRECT for end in ends if end.writable)
    return PipeRecord(number, capacity_bytes, packets, content)


def iter_content(fd: Fd, capacity_bytes: int) -> Iterator[bytes]:
    """Yield what is in the pipe, read by read, without taking it out."""
    n_bytes = count_bytes(fd)
    if not n_bytes:
        return
    copy_out, copy_in = (Fd(end) for end in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
    try:
        if capacity_bytes != _DEFAULT_BYTES:
            with contextlib.suppress(PermissionError):
                fcntl.fcntl(copy_in, fcntl.F_SETPIPE_SZ, capacity_bytes)
        if tee(fd, copy_in, _MAX_BYTES - 1) != n_bytes:
            raise HostFull(
                f"a pipe of {capacity_bytes} bytes cannot be copied", "raise fs.pipe-max-size"
            )
        os.close(copy_in)
        copy_in = Fd(-1)
        while part := os.read(copy_out, capacity_bytes):
            yield part
    finally:
        os.close(copy_out)
        if copy_in >= 0:
            os.close(copy_in)


def count_bytes(fd: Fd) -> int:
    """Return how many bytes wait in a pipe."""
    (n_bytes,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(n_bytes)


def open_again(record: PipeRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    key = (PIPE.name, record.pipe)
    if key not in opening.made:
        opening.made[key] = _make(record, opening)
    reader, writer = opening.made[key]
    if flags & O_LARGEFILE:
        # The kernel takes O_DIRECT for a pipe by fcntl, not always by open.
        plain = flags_for_open(flags) & ~os.O_DIRECT
        fd = Fd(os.open(f"/proc/self/fd/{reader}", plain))
    else:
        fd = duplicate(writer if may_write(flags) else reader)
    set_status_flags(fd, flags)
    return fd


def _make(record: PipeRecord, opening: Opening) -> tuple[Fd, Fd]:
    """Make the pipe with its content; both ends are closed once all descriptions are open."""
    mode = os.O_DIRECT if record.packets else 0
    reader, writer = (Fd(end) for end in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK | mode))
    opening.stack.callback(os.close, reader)
    opening.stack.callback(os.close, writer)
    set_capacity(writer, record.capacity_bytes, opening)
    for part in record.content:
        if os.write(writer, part) != len(part):
            raise OSError(f"{len(part)} bytes of content do not fit into a pipe of this host")
    return reader, writer


def set_capacity(fd: Fd, capacity_bytes: int, opening: Opening) -> None:
    """Give a pipe the size that it had, as far as we may; 0 leaves it alone."""
    if capacity_bytes in (0, _DEFAULT_BYTES):
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, capacity_bytes)
    except PermissionError:
        opening.options.warn(
            f"a pipe of the process held {capacity_bytes} bytes, this host allows less"
            " (/proc/sys/fs/pipe-max-size): it holds as much as a new one"
        )


def describe(record: PipeRecord) -> str:
    """See `Kind.describe`."""
    return f"pipe:[{record.pipe}]"


PIPE = Kind(
    "pipe",
    PipeRecord,
    matches=matches,
    problem=problem,
    is_kept=True,
    capture=capture,
    open=open_again,
    describe=describe,
)
