"""Unix sockets whose other ends are in the tree: stream, dgram, seqpacket; pairs, named, abstract.

    socketpair        A <────> B
    connection        accepted <────> client            made through a listener that may be gone
    listener          backlog: client 1, client 2 ...   connected, not accepted yet
    dgram             A ──> B by its name, or both ways

Who belongs to whom is told by unix_diag; what waits to be read is looked at and left where it is
(`unix_queue`). `unix_build` makes all of them once every record is known, with the names, peers,
queues and credentials (SO_PEERCRED, SO_PEERGROUPS, SCM_CREDENTIALS) that they had.

A datagram socket that is connected to a named socket outside the tree (/dev/log) is connected to
whoever has that name when it is restored.

Kernel: unix(7), sock_diag(7), SIOCUNIXFILE (4.12) for the file behind a name.

Refused before the target is stopped: ends outside the tree (unless they are standard streams, see
`external`, or the user declares them, see `outside`), out-of-band data, connections that have sent
something before they were accepted or whose client has gone, sockets that another process has open
too, sockets of another network namespace than their process's. Refused once it is stopped, for only
then can the queue be looked into: descriptors in flight that `unix_passed` does not know, or that
stand in a stream behind bytes without any (nobody can tell where the latter end), and packets of no
bytes behind others that an earlier dump has looked at (the kernel shows them once).

Not seen, and so lost: time stamps of packets that wait, credentials of messages that were sent
while the receiver did not ask for them.
"""

import errno
import fcntl
import os
import select
import stat
import struct
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterator
from functools import partial

import attrs

from ckpt.errors import Finding, UnsupportedState
from ckpt.kernel.arch import NR
from ckpt.kernel.namespaces import inside, read_namespace
from ckpt.kernel.procfs.files import list_pids
from ckpt.kernel.sock_diag import TCP_ESTABLISHED, UnixSocket, read_unix_sockets
from ckpt.process.pid_space import Numbers
from ckpt.process.remote import Call, InOut, Out, Reply, call
from ckpt.process.stand_in import Identity
from ckpt.resources.base import RestoreOptions
from ckpt.resources.files import outside, sockopts, unix_build, unix_passed, unix_queue
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind
from ckpt.resources.files.open_file import OpenFile, Problem, outside_problem
from ckpt.resources.files.sockopts import SOL_SOCKET, borrow_socket
from ckpt.resources.files.unix_build import NOBODY, UnixRecord
from ckpt.resources.files.unix_queue import SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM
from ckpt.units import Pid

_SIOCUNIXFILE = 0x89E0
_SO_PEERCRED, _SO_DOMAIN, _SO_PEERGROUPS = 17, 39, 59
_AF_UNIX = 1
_UCRED = struct.Struct("=iII")
_MOST_GROUPS = 256
_ENDED = 3
"""Both ways shut down."""


@attrs.frozen(slots=True, eq=False, repr=False)
class _View:
    """All unix sockets of the host, and which of them are in the tree."""

    sockets: dict[int, UnixSocket]
    """By inode number."""
    is_told: bool
    """Whether the kernel can tell of them at all."""
    in_tree: frozenset[int]
    """But for those that are declared."""
    declared: frozenset[int]
    """In the tree, and to be given to the restore (`outside`)."""
    waits_at: dict[int, int]
    """Client that was not accepted yet -> the listener, in the tree."""
    listening: frozenset[tuple[int, bytes]]
    """Kind and name of all sockets that listen."""


def _view_of(table: FdTable) -> _View:
    return table.tables.once("unix sockets", lambda: _read_view(table))


def _read_view(table: FdTable) -> _View:
    own = [file for file in table.files if stat.S_ISSOCK(file.status.st_mode)]
    declared = frozenset(file.status.st_ino for file in own if outside.is_named(file, table))
    in_tree = frozenset(file.status.st_ino for file in own) - declared
    try:
        sockets, is_told = _read_sockets_beside(table.pid), True
    except OSError:
        sockets, is_told = {}, False
    return _View(
        sockets,
        is_told,
        in_tree,
        declared,
        waits_at={
            client: inode
            for inode in in_tree & sockets.keys()
            for client in sockets[inode].waiting
            if sockets[inode].listens
        },
        listening=frozenset((one.kind, one.name) for one in sockets.values() if one.listens),
    )


def _read_sockets_beside(pid: Pid) -> dict[int, UnixSocket]:
    """Return the sockets of the network namespace that a process is in."""
    if read_namespace(pid, "net") == read_namespace(Pid(os.getpid()), "net"):
        return read_unix_sockets()
    with inside(pid, "net"):
        return read_unix_sockets()


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return stat.S_ISSOCK(file.status.st_mode) and not file.path_only


def is_for(file: OpenFile, table: FdTable) -> bool:
    """See `Kind.is_for`."""
    view = _view_of(table)
    if view.is_told:
        return file.status.st_ino in view.sockets
    with borrow_socket(file, table) as sock:
        return sock.getsockopt(SOL_SOCKET, _SO_DOMAIN) == _AF_UNIX


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    view = _view_of(table)
    if not view.is_told:
        return Problem("is a unix socket, of which this kernel does not tell (no unix_diag)")
    known = view.sockets[file.status.st_ino]
    found = _problem_of_others(file, known, view, table)
    if found or not table.running:
        # Of a frozen process the capture asks the rest: it borrows the socket anyway.
        return found
    with borrow_socket(file, table) as sock:
        return _problem_of_content(known, sock) or sockopts.problem(sock)


def _problem_of_others(
    file: OpenFile, known: UnixSocket, view: _View, table: FdTable
) -> Problem | None:
    """Tell which socket of another process it needs, or who has it too."""
    found = _problem_of_peer(known, view)
    if found or not table.running:
        return found
    holder = table.links_elsewhere.get(file.link)
    if holder is None:
        return None
    # Not by itself: its other end may be in the tree.
    text = f"is a unix socket that process {holder} has open too"
    return attrs.evolve(outside_problem(file.link, text), leads_outside=False)


def _problem_of_peer(known: UnixSocket, view: _View) -> Problem | None:
    if known.listens:
        return _problem_of_waiting(known, view)
    if known.peer is None:
        return None
    if known.inode in view.waits_at:
        if known.send_queue:
            return Problem("is a unix connection that was not accepted yet, and has sent data")
        return None
    if known.peer == 0:
        if known.kind == SOCK_DGRAM or known.shutdown == _ENDED:
            return None
        text = "is a unix connection that a process outside has not accepted yet"
        return outside_problem(_link_of(known.inode), text)
    if known.peer in view.in_tree or _can_be_called_again(known, view):
        return None
    if known.peer in view.declared:
        other = _link_of(known.peer)
        text = f"is a unix socket connected to {other}, which is declared external alone"
        return Problem(text, f"give --external '{_link_of(known.inode)}' too")
    text = f"is a unix socket connected to {_name_holder(known.peer)}"
    return outside_problem(_link_of(known.inode), text)


def _link_of(inode: int) -> str:
    return f"socket:[{inode}]"


def _problem_of_waiting(known: UnixSocket, view: _View) -> Problem | None:
    outside = [client for client in known.waiting if client not in view.in_tree]
    if not outside:
        return None
    n = len(outside)
    what = "1 connection waits" if n == 1 else f"{n} connections wait"
    who = _name_holder(outside[0]) if outside[0] else "a client that has gone"
    return Problem(f"is a listening unix socket, and {what} to be accepted, of {who}")


def _can_be_called_again(known: UnixSocket, view: _View) -> bool:
    """Tell whether a peer outside can be found by its name, and knows nothing of us."""
    peer = view.sockets.get(known.peer or 0)
    if known.kind != SOCK_DGRAM or peer is None or peer.peer == known.inode:
        return False
    return peer.name[:1] in (b"/", b"\0")


def _name_holder(inode: int) -> str:
    link = _link_of(inode)
    for pid in list_pids():
        try:
            names = os.listdir(f"/proc/{pid}/fd")
            if any(os.readlink(f"/proc/{pid}/fd/{name}") == link for name in names):
                return f"process {pid}, which is outside the tree"
        except OSError:
            continue
    return "a socket outside the tree"


def _problem_of_content(known: UnixSocket, sock: Socket) -> Problem | None:
    events = unix_queue.poll(sock)
    if events & select.POLLPRI:
        return Problem("is a unix socket with out-of-band data, which is not supported yet")
    if events & select.POLLERR and known.kind != SOCK_STREAM and known.receive_queue:
        return Problem("is a unix socket with an error that was not told yet, and packets to read")
    return None


_READ_THEM = "dump again when they have been received"


def ask(file: OpenFile) -> list[Call]:
    """See `Kind.ask`: who is at the other end, by the number that the process knows it under."""
    size = InOut(_UCRED.size.to_bytes(4, "little"))
    return [call(NR.getsockopt, file.fd, SOL_SOCKET, _SO_PEERCRED, Out(_UCRED.size), size)]


def capture(file: OpenFile, table: FdTable, replies: list[Reply]) -> UnixRecord:
    """See `Kind.capture`.

    Raises:
        UnsupportedState: what waits to be read cannot be captured.
    """
    view = _view_of(table)
    known = view.sockets[file.status.st_ino]
    waits = known.inode in view.waits_at
    with borrow_socket(file, table) as sock:
        found = _problem_of_content(known, sock) or sockopts.problem(sock)
        if found:
            raise _unsupported(file, table, found)
        peer_name = _read_peer_name(sock)
        accepted = _is_accepted(known, peer_name, view)
        has_file = not accepted and known.name[:1] not in (b"", b"\0")
        path, status = _find_file(sock) if has_file else ("", None)
        # First of all: what is done to look into the queue is seen in the options.
        options = sockopts.capture(sock)
        return UnixRecord(
            socket=known.inode,
            kind=known.kind,
            name=known.name,
            path=path,
            mode=stat.S_IMODE(status.st_mode) if status else 0,
            uid=status.st_uid if status else 0,
            gid=status.st_gid if status else 0,
            backlog=known.send_queue if known.listens else -1,
            waiting=known.waiting if known.listens else (),
            is_connected=known.peer is not None and not waits,
            peer=known.peer or 0,
            peer_name=peer_name,
            peer_is_outside=bool(known.peer) and known.peer not in view.in_tree,
            accepted=accepted,
            credentials=_read_credentials(sock, replies),
            client=_read_client(file) if waits else NOBODY,
            shutdown=known.shutdown,
            was_reset=bool(unix_queue.poll(sock) & select.POLLERR),
            messages=_read_messages(file, sock, known, view, table),
            options=options,
            file_inode=status.st_ino if status else 0,
            file_changed_ns=status.st_ctime_ns if status else 0,
        )


def _read_messages(
    file: OpenFile, sock: Socket, known: UnixSocket, view: _View, table: FdTable
) -> tuple[unix_queue.Message, ...]:
    """Return what waits to be read.

    Raises:
        UnsupportedState: some of it cannot be captured.
    """
    if known.listens or (known.kind != SOCK_DGRAM and known.state != TCP_ESTABLISHED):
        return ()
    is_ended = bool(known.shutdown & 1)
    try:
        messages = tuple(
            unix_queue.peek(
                sock,
                known.kind,
                known.receive_queue,
                partial(unix_passed.capture, table=table),
                is_ended=is_ended,
            )
        )
    except unix_passed.NotPassable as reason:
        what = f"holds a message with a descriptor (SCM_RIGHTS) that {reason}"
        raise _unsupported(file, table, Problem(what, _READ_THEM)) from None
    sender = view.sockets.get(known.peer or 0)
    if known.kind == SOCK_STREAM and any(message.passed for message in messages):
        if not sender or not unix_queue.are_whole(messages, sender.send_queue):
            what = "holds a descriptor (SCM_RIGHTS) behind other bytes, and none can tell where"
            raise _unsupported(file, table, Problem(what, _READ_THEM))
    elif sender and _sends_only_to(known, sender):
        unseen = unix_queue.count_unseen(messages, known.kind, sender.send_queue)
        if unseen:
            what = "holds packets of no bytes that an earlier dump looked at, and none can any more"
            raise _unsupported(file, table, Problem(what, _READ_THEM))
    return messages


def _sends_only_to(known: UnixSocket, sender: UnixSocket) -> bool:
    """Tell whether all that a sender has sent, and nobody has read, is in one queue of packets."""
    if known.kind == SOCK_STREAM or not sender.send_queue or sender.peer != known.inode:
        return False
    return known.kind == SOCK_SEQPACKET or not (known.name or sender.name)


def _unsupported(file: OpenFile, table: FdTable, found: Problem) -> UnsupportedState:
    finding = Finding(f"fd {file.fd} ({file.link})", found.text, found.remedy)
    return UnsupportedState(table.pid, (finding,))


def _find_file(sock: Socket) -> tuple[str, os.stat_result | None]:
    """Return path and state of the file that the socket was bound to; nothing if it is deleted."""
    try:
        fd = fcntl.ioctl(sock.fileno(), _SIOCUNIXFILE)
    except OSError:
        return "", None
    try:
        path, status = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd)
        if os.path.samestat(os.lstat(path), status):
            return path, status
    except OSError:
        pass
    finally:
        os.close(fd)
    return "", None


def _read_peer_name(sock: Socket) -> bytes:
    try:
        return unix_queue.to_name(sock.getpeername())
    except OSError:
        return b""


def _is_accepted(known: UnixSocket, peer_name: bytes, view: _View) -> bool:
    """Tell whether a connected socket has its name from the listener that it came from."""
    if known.kind == SOCK_DGRAM or known.listens or known.peer is None or not known.name:
        return False
    by_listener = (known.kind, known.name) in view.listening
    if not peer_name or (known.kind, peer_name) not in view.listening:
        # Whoever was made later was accepted, if none of the two names tells.
        return by_listener or not peer_name or known.inode > known.peer > 0
    return by_listener and known.inode > known.peer


def _read_credentials(sock: Socket, replies: list[Reply]) -> Identity:
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(SOL_SOCKET, _SO_PEERCRED, _UCRED.size))
    if pid <= 0:
        return NOBODY
    if replies and replies[0].ok:
        pid, _, _ = _UCRED.unpack(replies[0].outs[0])
    try:
        raw = sock.getsockopt(SOL_SOCKET, _SO_PEERGROUPS, 4 * _MOST_GROUPS)
    except OSError:
        raw = b""
    return Identity(pid, uid, gid, struct.unpack(f"={len(raw) // 4}I", raw))


def _read_client(file: OpenFile) -> Identity:
    """Return who has connected, as far as can be told: the first process that has it open."""
    pid = file.pid
    status = os.stat(f"/proc/{pid}")
    return Identity(pid, status.st_uid, status.st_gid)


def renumber(record: UnixRecord, numbers: Numbers) -> UnixRecord:
    """See `Kind.renumber`: the kernel tells us as whom we see those that wait or have sent."""
    messages = (attrs.evolve(one, pid=numbers.of(one.pid)) for one in record.messages)
    return attrs.evolve(
        record,
        client=attrs.evolve(record.client, pid=numbers.of(record.client.pid)),
        messages=tuple(messages),
    )


def settle(record: UnixRecord) -> UnixRecord:
    """See `Kind.settle`."""
    messages = tuple(
        attrs.evolve(one, passed=tuple(map(unix_passed.settle, one.passed))) if one.passed else one
        for one in record.messages
    )
    return attrs.evolve(record, messages=messages)


def check_host(record: UnixRecord) -> Iterator[Problem]:
    """See `Kind.check_host`: try to take an abstract name, and let go again."""
    if record.name[:1] != b"\0" or record.accepted:
        return
    shown = record.name[1:].decode(errors="backslashreplace")
    try:
        with sockopts.new_socket(_AF_UNIX, record.kind) as sock:
            sock.bind(record.name)
    except OSError as error:
        yield Problem(f"cannot have the abstract name @{shown} here ({error.strerror})")


def check_files(record: UnixRecord, _flags: int, options: RestoreOptions) -> Iterator[Problem]:
    """See `Kind.check_files`: the directory must be there, and the name free or a dead socket's."""
    for message in record.messages:
        for passed in message.passed:
            yield from unix_passed.check_files(passed, options)
    if record.path:
        yield from _check_path(record, options)


def _check_path(record: UnixRecord, options: RestoreOptions) -> Iterator[Problem]:
    folder = os.path.dirname(record.path)
    if not os.path.isdir(folder):
        yield Problem(f"was bound to {record.path}, and {folder} is not there")
        return
    try:
        status = os.lstat(record.path)
    except OSError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        yield Problem(f"was bound to {record.path}, which is no socket now")
    elif options.original_stands and _is_as_it_was(status, record):
        # On a file system that both hosts have, it is the original's, and has the name until then.
        return
    elif _is_alive(record.path):
        remedy = "end the process that has it, or let it close the socket"
        yield Problem(f"was bound to {record.path}, where another process listens now", remedy)


def _is_as_it_was(status: os.stat_result, record: UnixRecord) -> bool:
    return (status.st_ino, status.st_ctime_ns) == (record.file_inode, record.file_changed_ns)


def _is_alive(path: str) -> bool:
    """Tell whether some socket is bound to the file, in whatever network namespace.

    A datagram socket finds out without anybody hearing of it: what listens has another type.
    """
    try:
        file = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with sockopts.new_socket(_AF_UNIX, SOCK_DGRAM) as sock:
            sock.connect(f"/proc/self/fd/{file}")
        return True
    except OSError as error:
        # EPERM: a datagram socket that is connected to another one.
        return error.errno in (errno.EPROTOTYPE, errno.EPERM)
    finally:
        os.close(file)


UNIX = Kind(
    "unix",
    UnixRecord,
    matches=matches,
    is_for=is_for,
    problem=problem,
    ask=ask,
    capture=capture,
    settle=settle,
    renumber=renumber,
    check_host=check_host,
    check_files=check_files,
    open=unix_build.open_again,
    describe=unix_build.describe,
)
