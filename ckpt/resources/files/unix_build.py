"""Makes unix sockets in the restorer: all of a tree together, since each needs the others.

    open_again   once per socket: a place holder under the descriptor that it will have
    _Work        when all are known:   1 pairs and connections (put over the place holders)
                                       2 names   3 listeners   4 calls by name (dgram)
                                       5 connections that wait to be accepted, in their order
                                       6 what waits to be read   7 ends, options, flags
    at last      files of names appear where they were, when the tree is let go (`unix_names`)

A connection is made through a listener of ours that has the right name for as long as that takes:
its own listener may be gone, and the accepted end has its name from there. Whoever the kernel
shall name as the one who listened or connected does that for us (`unix_makers`). Options come last:
SO_PASSCRED would give names to sockets that have none, a filter would judge what we send.

Kernel: unix(7), connect(2) by /proc/self/fd/N, which also finds what has no name any more.
"""

import contextlib
import os
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import TypeVar

import attrs

from ckpt.errors import RestoreFailed
from ckpt.process.stand_in import Identity
from ckpt.resources.base import Opening
from ckpt.resources.files import sockopts, unix_passed, unix_queue
from ckpt.resources.files.kind import set_status_flags
from ckpt.resources.files.unix_makers import Makers
from ckpt.resources.files.unix_names import NewName, address_of, bind, bind_beside
from ckpt.resources.files.unix_queue import SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM, Message
from ckpt.units import Fd

_AF_UNIX = 1
_SHUT_RD, _SHUT_WR = 0, 1
_MAX_NAME_BYTES = 108
_ALL_MODES = 0o7777
_AT_ONCE = 100
"""Connections that wait at our listener before they are accepted."""

NOBODY = Identity(0, 0, 0)
T = TypeVar("T")


@attrs.frozen(slots=True, repr=False)
class UnixRecord:
    """A unix socket."""

    socket: int
    """Its inode number, by which the others name it."""
    kind: int
    """SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET."""
    name: bytes
    """Its address: a path as it was given, or a zero byte and an abstract name; empty: none."""
    path: str
    """Where the file of that name is; empty if there is none (any more)."""
    mode: int
    """Of that file, as `uid` and `gid`."""
    uid: int
    gid: int
    backlog: int
    """Of listen(2); -1 if it does not listen."""
    waiting: tuple[int, ...]
    """Those that wait to be accepted, in order."""
    is_connected: bool
    peer: int
    """The other end; 0 if it is none, or has gone."""
    peer_name: bytes
    peer_is_outside: bool
    """It is called again by its name."""
    accepted: bool
    """Its name is that of the listener that it came from."""
    credentials: Identity
    """What SO_PEERCRED tells: who connected, who listened, who made the pair."""
    client: Identity
    """Who connected it, if it waits to be accepted."""
    shutdown: int
    """1: reads no more, 2: writes no more."""
    was_reset: bool
    """The other end has gone without reading everything, and that was not told yet."""
    messages: tuple[Message, ...]
    options: sockopts.SocketOptions
    file_inode: int = 0
    """Of that file, as `file_changed_ns` (ctime): together they tell it from any later one."""
    file_changed_ns: int = 0

    def __attrs_post_init__(self) -> None:
        """Refuse what no unix socket can be."""
        if self.kind not in (SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET):
            raise ValueError(f"{self.kind} is no type of unix sockets")
        if max(len(self.name), len(self.peer_name)) > _MAX_NAME_BYTES:
            raise ValueError("the name of a unix socket is too long")
        if not -1 <= self.backlog < 1 << 31 or not 0 <= self.mode <= _ALL_MODES:
            raise ValueError("a unix socket cannot have such a backlog, or its file such a mode")
        if not 0 <= min(self.uid, self.gid) <= max(self.uid, self.gid) < 1 << 32:
            raise ValueError(f"nobody is {self.uid}:{self.gid}")
        if self.path and not self.path.startswith("/"):
            raise ValueError(f"{self.path} is no absolute path")


def describe(record: UnixRecord) -> str:
    """See `Kind.describe`; an abstract name begins with @, as in lists of sockets."""
    name = os.fsdecode(record.name.replace(b"\0", b"@"))
    own = f"unix:[{record.socket}]" + (f" {name}" if name else "")
    if record.backlog >= 0:
        return f"{own} (listens)"
    return own + (f"->unix:[{record.peer}]" if record.peer else "")


@attrs.define(slots=True, eq=False, repr=False)
class _End:
    """A socket that is made; a helper of ours where the other end is no more."""

    kind: int
    sock: Socket
    """Of the descriptor under which it will be inherited."""
    flags: int = 0
    record: UnixRecord | None = None
    peer: "_End | None" = None
    """To whom it is connected now."""
    name_of_helper: bytes = b""

    @property
    def name(self) -> bytes:
        """Its address."""
        return self.record.name if self.record else self.name_of_helper

    @property
    def is_accepted(self) -> bool:
        """Tell whether its name is that of the listener that it came from."""
        return self.record.accepted if self.record else bool(self.name_of_helper)

    @property
    def credentials(self) -> Identity:
        """What SO_PEERCRED shall tell."""
        return self.record.credentials if self.record else NOBODY


def open_again(record: UnixRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`: a place holder, until all records are known."""
    work = opening.made.get(_KEY)
    if work is None:
        work = opening.made[_KEY] = _Work(opening)
        opening.stack.push(work.close)
    sock = Socket(_AF_UNIX, record.kind | os.O_CLOEXEC)
    work.add(_End(record.kind, sock, flags, record))
    return Fd(sock.fileno())


_KEY = ("unix", 0)


class _Work:
    """All unix sockets of a tree; made when the other files are open."""

    def __init__(self, opening: Opening) -> None:
        """Know of none yet."""
        self._warn = opening.options.warn
        self._makers = Makers(opening.embryos)
        self._open_passed = partial(unix_passed.open_again, opening=opening)
        self._ends: dict[int, _End] = {}
        self._helpers: list[_End] = []
        self._files: list[NewName] = []
        opening.at_last.append(self._show_files)
        opening.at_go.append(self._clear_files)
        opening.at_failure.append(self._take_files_back)
        opening.at_end.append(self._clear_files)
        self._named: set[_End] = set()

    def add(self, end: _End) -> None:
        """Take one more."""
        assert end.record is not None
        self._ends[end.record.socket] = end

    def close(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Make all of them, unless something else has failed.

        Raises:
            RestoreFailed: one of them cannot be made.
        """
        try:
            if kind is None:
                self._make_all()
        except OSError as failed:
            raise RestoreFailed("making unix sockets", failed.strerror or str(failed)) from failed
        finally:
            for end in self._helpers:
                end.sock.close()
            for end in self._ends.values():
                end.sock.detach()

    def _show_files(self) -> None:
        """Have others find the sockets by their names.

        Raises:
            RestoreFailed: a name cannot be had.
        """
        for file in self._files:
            try:
                file.appear()
            except OSError as error:
                what = f"the name {file.path}: {error.strerror}"
                raise RestoreFailed("making unix sockets", what) from error

    def _take_files_back(self) -> None:
        for file in self._files:
            file.undo()

    def _clear_files(self) -> None:
        for file in self._files:
            file.clear()

    def _make_all(self) -> None:
        pairs = [_order(*pair) for pair in self._iter_pairs()]
        self._make_pairs([pair for pair in pairs if not pair[0].is_accepted])
        self._make_connections([pair for pair in pairs if pair[0].is_accepted])
        for end, record in self._iter_ends():
            if not record.accepted and end not in self._named:
                self._bind(end)
        for end, record in self._iter_ends():
            if record.backlog >= 0:
                self._makers.listen(end.sock, record.backlog, record.credentials)
        self._put_early()
        self._call_by_name()
        for end, record in self._iter_ends():
            self._queue_clients(end, record)
            self._put_messages(end, record.messages)
        self._finish()

    def _iter_ends(self) -> Iterator[tuple[_End, UnixRecord]]:
        for end in self._ends.values():
            if end.record:
                yield end, end.record

    # ---- 1: pairs and connections

    def _iter_pairs(self) -> Iterator[tuple[_End, _End]]:
        """Yield all that must be made together; what is only called by its name is left out."""
        for end, record in self._iter_ends():
            if end.peer or not record.is_connected or record.peer_is_outside:
                continue
            other = self._ends.get(record.peer)
            if end.kind == SOCK_DGRAM and other and (other.name or other.peer):
                continue
            if other is None or other.peer:
                other = self._new_helper(end.kind, record.peer_name)
            end.peer, other.peer = other, end
            yield end, other

    def _new_helper(self, kind: int, name: bytes) -> _End:
        """Make one in the place of an end that has gone."""
        sock = Socket(_AF_UNIX, kind | os.O_CLOEXEC)
        end = _End(kind, sock, name_of_helper=name if kind != SOCK_DGRAM else b"")
        self._helpers.append(end)
        return end

    def _make_pairs(self, pairs: list[tuple[_End, _End]]) -> None:
        for who, several in _by_identity(pairs, lambda pair: pair[0].credentials):
            for kind, alike in groupby(several, lambda pair: pair[0].kind):
                places = [(one.sock, other.sock) for one, other in alike]
                self._makers.make_pairs(kind, places, who)

    def _make_connections(self, pairs: list[tuple[_End, _End]]) -> None:
        """Make connections through listeners of ours, which have the names of those that were."""
        listeners = sorted({(a.kind, a.name, c.credentials) for a, c in pairs}, key=repr)
        for kind, name, who in listeners:
            own = [
                p for p in pairs if (p[0].kind, p[0].name, p[1].credentials) == (kind, name, who)
            ]
            with sockopts.new_socket(_AF_UNIX, kind) as listener:
                bind(listener, name)
                self._makers.listen(listener, _AT_ONCE, who)
                for start in range(0, len(own), _AT_ONCE):
                    self._connect_all(own[start : start + _AT_ONCE], listener)

    def _connect_all(self, pairs: list[tuple[_End, _End]], listener: Socket) -> None:
        for _, client in pairs:
            self._bind(client)
        with address_of(listener) as address:
            for who, several in _by_identity(pairs, lambda pair: pair[0].credentials):
                self._makers.connect([client.sock for _, client in several], address, who)
                for accepted, _ in several:
                    fd, _ = listener._accept()  # type: ignore[attr-defined]
                    os.dup2(fd, accepted.sock.fileno(), inheritable=False)
                    os.close(fd)

    # ---- 2 to 5: names, listeners, those who call and those who wait

    def _bind(self, end: _End) -> None:
        """Give a socket its own name; a helper one that nobody finds it by."""
        self._named.add(end)
        record = end.record
        if record and record.path:
            where = record.path, record.mode, record.uid, record.gid
            self._files.append(bind_beside(end.sock, record.name, *where))
        elif record and record.name:
            bind(end.sock, record.name)
        elif end.name[:1] not in (b"", b"\0"):
            bind(end.sock, end.name)

    def _call_by_name(self) -> None:
        """Connect datagram sockets; whoever is called must not have called another one yet."""
        calls: dict[_End, _End] = {}
        for end, record in self._iter_ends():
            other = self._ends.get(record.peer)
            if end.kind == SOCK_DGRAM and record.is_connected and other and end.peer is not other:
                calls[end] = other
        while calls:
            n_callers = Counter(calls.values())
            free = [
                end for end, other in calls.items() if n_callers[end] <= (calls.get(other) is end)
            ]
            for end in free or list(calls):
                with address_of(calls[end].sock) as address:
                    end.sock.connect(address)
                end.peer = calls.pop(end)
        for end, record in self._iter_ends():
            if record.peer_is_outside:
                self._call_outside(end, record)

    def _call_outside(self, end: _End, record: UnixRecord) -> None:
        shown = record.peer_name.replace(b"\0", b"@").decode(errors="backslashreplace")
        try:
            end.sock.connect(record.peer_name)
        except OSError as error:
            self._warn(f"a unix socket was connected to {shown}, and is not ({error.strerror})")

    def _queue_clients(self, end: _End, record: UnixRecord) -> None:
        clients = [self._ends[client] for client in record.waiting if client in self._ends]
        if not clients:
            return
        with address_of(end.sock) as address:
            for who, several in _by_identity(clients, _client_of):
                self._makers.connect([client.sock for client in several], address, who)

    # ---- 6: what waits to be read

    def _put_early(self) -> None:
        """Put in what a datagram socket got before it called: afterwards only its peer may send."""
        for end, record in self._iter_ends():
            if end.kind != SOCK_DGRAM or end.peer or not record.is_connected:
                continue
            other = self._ends.get(record.peer)
            name = other.name if other else record.peer_name
            late = [n for n, one in enumerate(record.messages) if one.source == name]
            early = record.messages[: late[0] if late else len(record.messages)]
            self._put_messages(end, early)
            end.record = attrs.evolve(record, messages=record.messages[len(early) :])

    def _put_messages(self, end: _End, messages: Iterable[Message]) -> None:
        if end.kind != SOCK_DGRAM:
            if end.peer:
                with unix_queue.roomy(end.peer.sock):
                    unix_queue.put(messages, end.peer.sock, b"", self._open_passed)
            return
        for source, several in groupby(messages, lambda one: one.source):
            with self._sender(end, source) as sender, unix_queue.roomy(sender.sock):
                if sender.peer is end:
                    unix_queue.put(several, sender.sock, b"", self._open_passed)
                    continue
                with address_of(end.sock) as address:
                    unix_queue.put(several, sender.sock, address, self._open_passed)

    @contextlib.contextmanager
    def _sender(self, end: _End, source: bytes) -> Iterator[_End]:
        """Lend a socket that has the sender's name."""
        peer = end.peer
        if peer and (peer.name == source or peer.record is None):
            yield peer
            return
        for other, record in self._iter_ends():
            if source and record.kind == SOCK_DGRAM and record.name == source:
                yield other
                return
        with sockopts.new_socket(_AF_UNIX, SOCK_DGRAM) as sock:
            if source:
                with contextlib.suppress(OSError):
                    bind(sock, source)
            yield _End(SOCK_DGRAM, sock)

    # ---- 7: ends, options, flags

    def _finish(self) -> None:
        for end, record in self._iter_ends():
            if end.peer in self._helpers and record.was_reset and end.kind != SOCK_DGRAM:
                end.sock.send(b"\0")
            elif record.shutdown and end.peer not in self._helpers:
                _shut_down(end.sock, record.shutdown)
        for helper in self._helpers:
            helper.sock.close()
        for end, record in self._iter_ends():
            if end.kind == SOCK_DGRAM and end.peer in self._helpers and record.shutdown:
                _shut_down(end.sock, record.shutdown)
            sockopts.restore(record.options, end.sock, self._warn)
            set_status_flags(Fd(end.sock.fileno()), end.flags)


def _order(one: _End, other: _End) -> tuple[_End, _End]:
    """Put the accepted end first; of two that could be that, the one that we know more of."""
    if other.record and other.record.accepted:
        return other, one
    if one.record and one.record.accepted:
        return one, other
    return (other, one) if other.is_accepted else (one, other)


def _shut_down(sock: Socket, ways: int) -> None:
    with contextlib.suppress(OSError):
        if ways & 1:
            sock.shutdown(_SHUT_RD)
        if ways & 2:
            sock.shutdown(_SHUT_WR)


def _client_of(end: _End) -> Identity:
    return end.record.client if end.record else NOBODY


def _by_identity(
    items: Iterable[T], identity: Callable[[T], Identity]
) -> Iterator[tuple[Identity, list[T]]]:
    """Yield runs of items that the same one does, in their order."""
    for who, several in groupby(items, identity):
        yield who, list(several)
