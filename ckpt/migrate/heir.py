"""The destination's heir: it tells the source what became of the tree if the worker is killed.

    session's process     forks the worker, waits for its end, inherits the questions
     └ worker             does everything (`arrival`); dies with the tree unless that was let go

What the worker is about to let go it tells the heir before. If the heir is the one that is killed,
the worker goes on without.

A tree whose memory was still to come has no part without the worker: servers of pages end with it,
and so do their processes. If all live, all of it had come. If not, the tree may have run here.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable

from ckpt.errors import CkptError, PeerLost, PeerRefused
from ckpt.kernel.pidfd import pidfd_open
from ckpt.migrate.channel import Channel
from ckpt.migrate.fates import (
    Fates,
    Member,
    NoteMembers,
    pack_members,
    unpack_members,
    wait_until_ended,
)
from ckpt.migrate.messages import Abort, AllThere, Complete, Done, Go, Purpose, Running, WhatNow
from ckpt.migrate.session import Session
from ckpt.units import Fd, Pid

_DOUBT_S = 600.0
"""How long the source may take to ask."""


def serve_with_heir(session: Session, work: Callable[[Session, NoteMembers], int]) -> int:
    """Do `work` in a child, and answer for it if it is killed; return its exit code.

    Args:
        session: just begun.
        work: is given what to call with the processes that it is about to let go.
    """
    heard, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(heard)
        _be_worker(session, work, Fd(said))
    os.close(said)
    session.channel.abandon()
    fates, late = _hear(heard)
    worker = pidfd_open(Pid(pid))
    wait_until_ended(worker)
    os.close(worker)
    _, status = os.waitpid(pid, 0)
    exit_code = os.waitstatus_to_exitcode(status)
    if exit_code >= 0:
        return exit_code
    _answer(session, fates, late=late)
    return 128 - exit_code


def _be_worker(session: Session, work: Callable[[Session, NoteMembers], int], said: Fd) -> None:
    def note_members(members: list[Member], *, late: bool) -> None:
        packed = bytes([late]) + pack_members(members)
        # Nobody need be there to hear it.
        with contextlib.suppress(BrokenPipeError):
            os.write(said, len(packed).to_bytes(4, "little") + packed)

    exit_code = 70
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        exit_code = work(session, note_members)
    finally:
        # Nothing of the parent's own ending may run here too.
        os._exit(exit_code)


def _hear(heard: int) -> tuple[Fates | None, bool]:
    """Read what the worker notes until it is gone."""
    fates, late = None, False
    with open(heard, "rb") as pipe:
        while len(length := pipe.read(4)) == 4:
            packed = pipe.read(int.from_bytes(length, "little"))
            fates, late = Fates(unpack_members(packed[1:])), bool(packed[0])
    return fates, late


def _answer(session: Session, fates: Fates | None, *, late: bool) -> None:
    """Tell whoever asks whether the tree runs here."""
    running = fates is not None and fates.settle()
    gone = "the receiver was killed, and nothing is left of the tree there"
    word: Running | Abort = Abort(gone, ran=late)
    if running and fates is not None:
        word = Running(fates.root, 0.0)
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
            if isinstance(asked, Done | Abort):
                return True
            is_last = isinstance(asked, AllThere) and isinstance(word, Running)
            channel.send(Complete() if is_last else word)
    except (PeerLost, PeerRefused):
        return False
