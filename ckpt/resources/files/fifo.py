"""Named pipes (FIFOs) that nobody outside the tree has open.

The name must still be there, and is what they are opened by; content and size belong to the inode
and are put back, as those of a pipe (`pipe`). A read end tells a hang-up only if it has seen a
writer since it was opened:

    writers in the tree           all are opened while we hold both ends
    none, hang-up told before     opened while we hold a write end, which is then closed
    none, no hang-up              opened while nobody has a write end

One that is deleted is made again in its directory, for as long as it takes to open it.

Kernel: fifo(7), fcntl(2) F_GETPIPE_SZ and F_SETPIPE_SZ, tee(2), poll(2).

Refused where its original still has it open on the same kernel (`original_is_near`).

Refused before the target is stopped: one that another process has open too (unless it is a standard
stream, see `external`), and one that is deleted with its directory. Who waits for a partner in
open(2) has nothing open yet, and is not seen. To copy what waits in one that has no reader, we are
a reader of it for a moment, while the tree stands still.
"""

import fcntl
import os
import secrets
import select
import stat
from collections.abc import Iterator

import attrs

from ckpt.kernel.procfs.files import list_pids
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.files import late
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, flags_for_open, set_status_flags
from ckpt.resources.files.open_file import OpenFile, Problem, outside_problem, path_problem
from ckpt.resources.files.pipe import count_bytes, iter_content, set_capacity
from ckpt.units import Fd, Pid

_MAX_BYTES = 1 << 31


_DELETED = " (deleted)"


@attrs.frozen(slots=True, repr=False)
class Deleted:
    """What a named pipe was made with that has no name any more."""

    mode: int
    uid: int
    gid: int


@attrs.frozen(slots=True, repr=False)
class FifoRecord:
    """One end of a named pipe. The first end of each tells what is in it, the others nothing."""

    path: str
    deleted: Deleted | None
    fifo: int
    """Its inode number: ends with the same number belong together."""
    has_writer: bool
    """Somebody in the tree has a write end."""
    hung_up: bool
    """This end tells that all writers are gone."""
    capacity_bytes: int
    """0 if another end tells."""
    content: bytes

    def __attrs_post_init__(self) -> None:
        """Refuse what no pipe can be."""
        if not 0 <= self.capacity_bytes <= _MAX_BYTES:
            raise ValueError(f"a pipe cannot hold {self.capacity_bytes} bytes")


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    is_named = stat.S_ISFIFO(file.status.st_mode) and not file.link.startswith("pipe:")
    return is_named and not file.path_only


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    found = _path_problem(file)
    if found is None and table.running:
        holder = _find_holder(file, table)
        if holder is not None:
            return outside_problem(file.link, f"is a named pipe that process {holder} has open too")
    return found


def _path_problem(file: OpenFile) -> Problem | None:
    if not _is_deleted(file):
        return path_problem(file)
    folder = os.path.dirname(file.link)
    if os.path.isdir(folder):
        return None
    return Problem(f"is deleted, and {folder} with it, which is not supported")


def _is_deleted(file: OpenFile) -> bool:
    return file.status.st_nlink == 0 and file.link.endswith(_DELETED)


def _find_holder(file: OpenFile, table: FdTable) -> Pid | None:
    """Return a process outside the tree that has it open."""
    for pid in list_pids():
        if late.is_of_tree(pid, table):
            continue
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        if any(_is_it(f"/proc/{pid}/fd/{name}", file) for name in names):
            return pid
    return None


def _is_it(path: str, file: OpenFile) -> bool:
    try:
        return os.readlink(path) == file.link and os.path.samestat(os.stat(path), file.status)
    except OSError:
        return False


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> FifoRecord:
    """See `Kind.capture`."""
    ends = [end for end in table.same_inode(file) if not end.path_only]
    has_writer = any(end.writable for end in ends)
    status = file.status
    deleted = Deleted(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
    record = FifoRecord(
        path=file.link.removesuffix(_DELETED) if _is_deleted(file) else file.link,
        deleted=deleted if _is_deleted(file) else None,
        fifo=file.status.st_ino,
        has_writer=has_writer,
        hung_up=not has_writer and _is_hung_up(file, table),
        capacity_bytes=0,
        content=b"",
    )
    if ends[0] is not file:
        return record
    reader = next((end for end in ends if end.readable), None)
    with table.borrow(reader or file) as fd:
        capacity_bytes = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        content = _read_content(fd, capacity_bytes, is_reader=reader is not None)
    return attrs.evolve(record, capacity_bytes=capacity_bytes, content=content)


def _is_hung_up(file: OpenFile, table: FdTable) -> bool:
    poll = select.poll()
    with table.borrow(file) as fd:
        poll.register(fd, 0)
        return bool(dict(poll.poll(0)).get(fd, 0) & select.POLLHUP)


def _read_content(fd: Fd, capacity_bytes: int, *, is_reader: bool) -> bytes:
    if not count_bytes(fd):
        return b""
    if is_reader:
        return b"".join(iter_content(fd, capacity_bytes))
    reader = Fd(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        return b"".join(iter_content(reader, capacity_bytes))
    finally:
        os.close(reader)


def check_files(record: FifoRecord, _flags: int, options: RestoreOptions) -> Iterator[Problem]:
    """See `Kind.check_files`."""
    if record.deleted:
        folder = os.path.dirname(record.path)
        if not os.path.isdir(folder):
            yield Problem(
                f"was deleted, and cannot be made again in {folder}", "make the directory"
            )
        return
    try:
        status = os.stat(record.path)
    except OSError as error:
        yield Problem(f"cannot be opened ({error.strerror})", "make it again (mkfifo)")
        return
    if not stat.S_ISFIFO(status.st_mode):
        yield Problem("is no named pipe any more", "make it again (mkfifo)")
    elif options.original_is_near and status.st_ino == record.fifo:
        # What is in it is in it already, and who reads there would hear of us.
        yield Problem("is a named pipe that its original has open on this very kernel", _APART)


_APART = "use 'ckpt dump --kill' and 'ckpt restore' between such hosts"


def open_again(record: FifoRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    key = (FIFO.name, record.fifo)
    if key not in opening.made:
        opening.made[key] = _make(record, opening)
    path = opening.made[key]
    writer = _open_end(path, os.O_WRONLY) if record.hung_up else None
    try:
        fd = Fd(os.open(path, flags_for_open(flags) | os.O_NONBLOCK))
    finally:
        if writer is not None:
            os.close(writer)
    set_status_flags(fd, flags)
    return fd


def _open_end(path: str, mode: int) -> Fd:
    return Fd(os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC))


def _make(record: FifoRecord, opening: Opening) -> str:
    """Put size and content back, and hold an end until all are open; return the path to open."""
    path = _make_again(record.path, record.deleted, opening) if record.deleted else record.path
    held = _open_end(path, os.O_RDWR if record.has_writer else os.O_RDONLY)
    opening.stack.callback(os.close, held)
    if not stat.S_ISFIFO(os.fstat(held).st_mode):
        raise OSError("it is no named pipe any more")
    if count_bytes(held):
        raise OSError("there is something in it already: another process has it open")
    set_capacity(held, record.capacity_bytes, opening)
    if record.content:
        writer = _open_end(path, os.O_WRONLY)
        try:
            if os.write(writer, record.content) != len(record.content):
                raise OSError(f"{len(record.content)} bytes do not fit into a pipe of this host")
        finally:
            os.close(writer)
    return path


def _make_again(path: str, deleted: Deleted, opening: Opening) -> str:
    """Make a deleted one, under its name or one beside it; it is deleted once all are open."""
    made = path
    while True:
        try:
            os.mkfifo(made, 0o600)
            break
        except FileExistsError:
            made = f"{path}.{secrets.token_hex(4)}"
    opening.stack.callback(os.unlink, made)
    os.chown(made, deleted.uid, deleted.gid)
    os.chmod(made, deleted.mode)
    return made


FIFO = Kind(
    "fifo",
    FifoRecord,
    matches=matches,
    problem=problem,
    capture=capture,
    check_files=check_files,
    open=open_again,
)
