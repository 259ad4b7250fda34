"""A tree that runs here before all of its memory has come: the destination's side of `--lazy`.

    State       says which pages are missing; their mappings are watched (`engine.guard`)
    streams     opened by the source: the servers' faults are served from then on
    Go, Running as ever; the source keeps what it has, standing still
    Complete    all has come; the source may end
    Abort       (D) a server has ended, or the source was gone for too long: nothing is left here
                (S) it has ended, and with it what was still to come

Connections come at any time, and one thread takes all of them. Neighbours: `arrival` is the whole
story, `fetching` moves the pages, `remaining` is the other side.
"""

import contextlib
import os
import queue
import select
import threading
import time
from collections.abc import Sequence

import attrs

from ckpt.engine.building import Part, part_at_once
from ckpt.engine.guard import Lazy
from ckpt.engine.postponing import alone_in_memory, split_mappings
from ckpt.engine.records import ProcessImage, TreeImage
from ckpt.errors import PeerLost, PeerRefused, ProtocolError, TreeLost
from ckpt.image.reader import PageReader
from ckpt.migrate.channel import Channel
from ckpt.migrate.fates import Fates, Member
from ckpt.migrate.fetching import Courier, Streams
from ckpt.migrate.messages import (
    Abort,
    AllThere,
    Complete,
    Done,
    KeepAlive,
    PagesOf,
    Purpose,
    Running,
    WhatNow,
)
from ckpt.migrate.session import Joined, Session
from ckpt.migrate.spans import unpack_spans
from ckpt.units import Pid

_TELL_S = 30.0
"""How long to wait for the word that it was heard what became of it."""
_ACCEPT_S = 0.5
_REMEDY = "The rest of its memory was at the source of the migration"


@attrs.define(repr=False)
class Late:
    """What such an arrival needs besides; a context manager, begun when the offer was accepted."""

    session: Session
    peer: str
    courier: Courier = attrs.field(init=False)
    _streams: Streams = attrs.field(init=False)
    _resumed: "queue.SimpleQueue[Joined]" = attrs.Factory(queue.SimpleQueue)
    _over: threading.Event = attrs.Factory(threading.Event)
    _source_ended: bool = False
    """Somebody has said so, and that was the last word from there: nobody asks any more."""
    _taker: threading.Thread = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """Begin without a connection."""
        self._streams = Streams(self.peer)
        self.courier = Courier(self._streams)
        self._taker = threading.Thread(target=self._take, name="ckpt-taking", daemon=True)

    def _take(self) -> None:
        while not self._over.is_set():
            joined = self.session.accept(_ACCEPT_S)
            if joined is None:
                continue
            if joined.purpose is Purpose.STREAM:
                self._streams.add(joined.channel)
            else:
                self._resumed.put(joined)
                os.eventfd_write(self.courier.wake_fd, 1)

    def accept(self, timeout_s: float) -> Joined | None:
        """Return the next connection that is no stream; None if none came in time."""
        with contextlib.suppress(queue.Empty):
            return self._resumed.get(timeout=timeout_s) if timeout_s > 0 else self._next()
        return None

    def _next(self) -> Joined:
        return self._resumed.get_nowait()

    def parts(
        self, tree: TreeImage, reader: PageReader, missing: Sequence[PagesOf]
    ) -> dict[Pid, Part]:
        """Return what is to be built, with the pages that come later.

        Raises:
            ProtocolError: pages are said to be missing that cannot come later.
        """
        alone = alone_in_memory(tree)
        by_space = {one.space: one for one in missing}
        parts = {}
        for process in tree.processes:
            said = by_space.pop(process.space, None) if process.pid in alone else None
            if said is None:
                parts[process.pid] = part_at_once(process, reader)
            else:
                parts[process.pid] = self._part(process, reader, said)
        if by_space:
            raise ProtocolError(peer=self.peer, reason="pages are missing of nobody's memory")
        return parts

    def _part(self, process: ProcessImage, reader: PageReader, said: PagesOf) -> Part:
        try:
            spans = unpack_spans(said.spans)
            lazy, others = split_mappings(process.resources["memory"].vmas, spans)
        except ValueError as error:
            raise ProtocolError(peer=self.peer, reason=str(error)) from error
        runs = reader.resolve(process.space).clip(others)
        if not lazy:
            return Part(process, runs)
        return Part(process, runs, Lazy(self.courier.pages(said.space, spans, _REMEDY), lazy))

    def see_through(
        self, channel: Channel | None, running: Running, members: Sequence[Member]
    ) -> None:
        """Wait until all pages have come, and tell the source.

        Args:
            channel: over which the source was told that it runs here, if it is still there.
            running: that.
            members: all processes, as they were then.

        Raises:
            TreeLost: they will never come; nothing is left of the tree.
        """
        fates = Fates(members)
        while not self.courier.is_settled:
            channel = self._hear(channel, running)
            self._wait(channel)
        failure = self.courier.failure
        if failure is None:
            self._tell(channel, running, Complete())
            return
        fates.end_all()
        reason = f"its memory could not be fetched: {failure.message()}"
        self._tell(channel, running, Abort(reason[:1000], ran=True))
        raise TreeLost(reason)

    def _wait(self, channel: Channel | None) -> None:
        """Wait for something to happen; meanwhile give a sign of life now and then."""
        poll = select.poll()
        poll.register(self.courier.wake_fd, select.POLLIN)
        keep_alive_s = 2.0
        if channel is not None:
            poll.register(channel.fileno(), select.POLLIN)
            keep_alive_s = channel.patience.keep_alive_s
        if poll.poll(keep_alive_s * 1000):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.courier.wake_fd)
        elif channel is not None:
            # If it is cut, the next to read from it is told.
            with contextlib.suppress(PeerLost, PeerRefused):
                channel.send(KeepAlive())

    def _hear(self, channel: Channel | None, running: Running) -> Channel | None:
        """Listen to what the source says, if anything; return where it is to be told."""
        joined = self.accept(0)
        if joined is not None:
            if channel is not None:
                channel.close()
            channel = joined.channel
        while channel is not None:
            try:
                said = channel.try_receive(WhatNow, AllThere, Abort, Done, timeout_s=0)
                if said is None:
                    return channel
                if isinstance(said, AllThere | Done):
                    continue
                if isinstance(said, WhatNow):
                    channel.send(running)
                    channel.receive(Done, timeout_s=_TELL_S)
                else:
                    self._source_ended = True
                    self._streams.give_up("it has ended there, with what was still to come")
            except (PeerLost, PeerRefused):
                pass
            # It has said all that it will over this one.
            channel.close()
            channel = None
        return None

    def _tell(self, channel: Channel | None, running: Running, word: Complete | Abort) -> None:
        """Say what became of it, until that was heard or nobody asks any more."""
        give_up_s = time.monotonic() + _TELL_S
        while not self._source_ended and (left_s := give_up_s - time.monotonic()) > 0:
            if channel is None:
                joined = self.accept(left_s)
                if joined is None:
                    return
                channel = self._hear(joined.channel, running)
                continue
            with contextlib.suppress(PeerLost, PeerRefused), channel:
                channel.send(word)
                channel.receive(Done, timeout_s=left_s)
                return
            channel = None

    def __enter__(self) -> "Late":
        """Return self, taking connections."""
        self._taker.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Fetch no more; servers that are not done end, and so do their processes."""
        self._over.set()
        self._streams.give_up("the migration is over")
        self.courier.close()
        self._taker.join()
