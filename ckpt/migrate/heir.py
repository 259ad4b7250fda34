"""The destination's heir: it tells the source what became of the tree if the worker is killed.

    session's process     forks the worker, waits for its end, inherits the questions
     └ worker             does everything (`arrival`); dies with the tree unless that was let go

What the worker is about to let go it tells the heir before. If the heir is the one that is killed,
the worker goes on without.

A tree whose memory was still to come has no part without the worker: servers of pages end with it,
and so do their processes. If all live, all of it had come. If not, the tree may have run here.
"""

import contextlib
import enum
import os
import shutil
import signal
import time
from collections.abc import Callable

import attrs

from ckpt import fault
from ckpt.errors import CkptError, PeerLost, PeerRefused
from ckpt.kernel.pidfd import pidfd_open
from ckpt.migrate.channel import Channel
from ckpt.migrate.fates import (
    Fates,
    Member,
    pack_members,
    unpack_members,
    wait_until_ended,
)
from ckpt.migrate.messages import Abort, AllThere, Complete, Done, Go, Purpose, Running, WhatNow
from ckpt.migrate.session import Session
from ckpt.units import Fd, Pid

_DOUBT_S = 600.0
"""How long the source may take to ask."""
_BROKEN = 70
"""How a worker ends by what is no `CkptError`: it has told nobody what became of the tree."""


class _Note(enum.IntEnum):
    """What the worker has the heir know: one byte, four of length, and that many of content."""

    ARRIVING = 1
    MEMBERS = 2
    PREPARED = 3
    SETTLED = 4


@attrs.frozen(repr=False)
class Notes:
    """The worker's end of the pipe to its heir."""

    _fd: Fd

    def arriving(self, root: Pid) -> None:
        """Note that this host may be given the addresses of a tree."""
        self._write(_Note.ARRIVING, root.to_bytes(4, "little"))

    def members(self, members: list[Member], *, late: bool) -> None:
        """Note the processes that are about to be let go; `late`: before their memory is there."""
        self._write(_Note.MEMBERS, bytes([late]) + pack_members(members))

    def prepared(self) -> None:
        """Note that the source may ask from here on what became of the tree."""
        self._write(_Note.PREPARED, b"")

    def settled(self) -> None:
        """Note that the source knows what became of the tree."""
        self._write(_Note.SETTLED, b"")

    def _write(self, note: _Note, content: bytes) -> None:
        # Nobody need be there to hear it.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._fd, bytes([note]) + len(content).to_bytes(4, "little") + content)


@attrs.define(repr=False)
class _Heard:
    """What the worker has noted."""

    arriving: Pid | None = None
    """Whose addresses may have come."""
    fates: Fates | None = None
    is_late: bool = False
    is_prepared: bool = False
    is_settled: bool = False


def serve_with_heir(
    session: Session,
    work: Callable[[Session, Notes], int],
    private: str,
    undo_arrival: Callable[[Pid], None],
) -> int:
    """Do `work` in a child, answer for it if it is killed or breaks; return its exit code.

    Args:
        session: just begun.
        work: is given what to note its steps with.
        private: a directory that goes when the child has ended.
        undo_arrival: called with the root of the tree, if its addresses may have come, and the
            child was killed, and with it the tree.

    Raises:
        OSError: there is no room for a child.
    """
    heard, said = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        shutil.rmtree(private, ignore_errors=True)
        raise
    if pid == 0:
        os.close(heard)
        _be_worker(session, work, Fd(said))
    fault.forget()
    os.close(said)
    session.channel.abandon()
    noted = _hear(heard)
    worker = pidfd_open(Pid(pid))
    wait_until_ended(worker)
    os.close(worker)
    _, status = os.waitpid(pid, 0)
    shutil.rmtree(private, ignore_errors=True)
    exit_code = os.waitstatus_to_exitcode(status)
    was_killed = exit_code < 0
    if not noted.is_settled and (was_killed or (exit_code == _BROKEN and noted.is_prepared)):
        _settle(session, noted, undo_arrival)
    return 128 - exit_code if was_killed else exit_code


def _be_worker(session: Session, work: Callable[[Session, Notes], int], said: Fd) -> None:
    exit_code = _BROKEN
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        exit_code = work(session, Notes(said))
    finally:
        # Nothing of the parent's own ending may run here too.
        os._exit(exit_code)


def _hear(heard: int) -> _Heard:
    """Read what the worker notes until it is gone."""
    noted = _Heard()
    with open(heard, "rb") as pipe:
        while len(head := pipe.read(5)) == 5:
            content = pipe.read(int.from_bytes(head[1:], "little"))
            if head[0] == _Note.ARRIVING:
                noted.arriving = Pid(int.from_bytes(content, "little"))
            elif head[0] == _Note.MEMBERS:
                noted.fates = Fates(unpack_members(content[1:]))
                noted.is_late = bool(content[0])
            else:
                noted.is_prepared = True
                noted.is_settled = head[0] == _Note.SETTLED
    return noted


def _settle(session: Session, noted: _Heard, undo_arrival: Callable[[Pid], None]) -> None:
    """Find out whether the tree runs here, and tell whoever asks."""
    fates = noted.fates
    if fates is not None and fates.settle():
        _answer(session, Running(fates.root, 0.0))
        return
    if noted.arriving is not None:
        undo_arrival(noted.arriving)
    if noted.is_prepared:
        gone = "the receiver was killed, and nothing is left of the tree there"
        _answer(session, Abort(gone, ran=noted.is_late))


def _answer(session: Session, word: Running | Abort) -> None:
    """Tell it to whoever asks, until it was heard."""
    give_up_s = time.monotonic() + _DOUBT_S
    while (left_s := give_up_s - time.monotonic()) > 0:
        joined = session.accept(left_s)
        if joined is None:
            return
        with joined.channel as channel, contextlib.suppress(CkptError):
            if joined.purpose == Purpose.RESUME and _tell(channel, word):
                return


def _tell(channel: Channel, word: Running | Abort) -> bool:
    """Answer one connection; tell whether it was heard."""
    try:
        while True:
            asked = channel.receive(WhatNow, Go, AllThere, Abort, Done)
            if isinstance(asked, Done):
                with contextlib.suppress(CkptError):
                    channel.send(asked)
            if isinstance(asked, Done | Abort):
                return True
            is_last = isinstance(asked, AllThere) and isinstance(word, Running)
            channel.send(Complete() if is_last else word)
    except (PeerLost, PeerRefused):
        return False
