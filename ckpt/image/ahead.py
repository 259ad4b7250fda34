"""Checking a generation in a child process while the parent still loads what a restore needs.

Loading takes one processor, and with the interpreter lock threads would hardly get to work beside
it. Parent and child take tickets from one pipe: when the parent has time it helps until none is
left. What the child finds wrong it does not tell: the parent then checks everything itself.
"""

import contextlib
import os
import signal
from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from ckpt.image.chain import Chain
from ckpt.image.reader import Frame, PageReader, check_stored
from ckpt.image.verify import iter_needed, verify_frames
from ckpt.image.workers import count_free_threads, for_each
from ckpt.units import GenerationNo

_WORTH_BYTES = 32 << 20
"""Stored bytes below which a fork costs more than it saves."""
_TICKET_BYTES = 4
_MOST_TICKETS = 8192
"""All must fit into a pipe (64 KiB)."""


class Ahead:
    """A context manager around the checking; leaving it ends the child."""

    def __init__(self, chain: Chain, generation: GenerationNo) -> None:
        """Check the lineage of `generation`, and begin with the frames that a restore will use.

        State: no other thread of ours runs.

        Raises:
            ImageError: something of the lineage is wrong.
        """
        self._chain = chain
        self._threads = count_free_threads()
        self.reader = PageReader(chain, generation, threads=self._threads)
        self._spaces = [self.reader.resolve(space) for space in self.reader.manifest.spaces]
        self._frames = list(iter_needed(self.reader, self._spaces))
        self._child = 0
        self._tickets = -1
        self._each = -(-len(self._frames) // _MOST_TICKETS)
        if sum(frame.location.stored_bytes for frame in self._frames) >= _WORTH_BYTES:
            self._begin()

    def _begin(self) -> None:
        self._tickets, given = os.pipe()
        with open(given, "wb") as pipe:
            pipe.write(array("I", range(0, len(self._frames), self._each)).tobytes())
        self._child = os.fork()
        if self._child == 0:
            status = 1
            try:
                for frame in self._iter_taken():
                    check_stored(self._chain, frame)
                status = 0
            finally:
                # Nothing of the parent's own ending may run here too.
                os._exit(status)

    def _iter_taken(self) -> Iterator[Frame]:
        """Yield the frames of each ticket that is taken, until none is left."""
        while ticket := os.read(self._tickets, _TICKET_BYTES):
            (first,) = array("I", ticket)
            yield from self._frames[first : first + self._each]

    def finish(self) -> PageReader:
        """Help with the rest and return the reader: everything was checked.

        Raises:
            ImageError: the first thing that is wrong.
        """
        if self._child:
            for_each(
                lambda frame: check_stored(self._chain, frame), self._iter_taken(), self._threads
            )
            _, status = os.waitpid(self._child, 0)
            self._child = 0
            if status == 0:
                return self.reader
        verify_frames(self._chain, self.reader, self._spaces, threads=self._threads)
        return self.reader

    def close(self) -> None:
        """End the child, if it still works; may be called again."""
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0
        if self._tickets >= 0:
            os.close(self._tickets)
            self._tickets = -1

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See `close`."""
        self.close()
