"""Serving the memory of a restored process while it runs already.

Its private anonymous memory is watched by a userfaultfd. Who touches a page that is not there waits
until we have put it in place; the rest comes in the background, what was written last first. Each
frame is checked when it is read; a damaged one ends the serving, and then the guard ends the
process (`guard.py`).

The process goes on meanwhile, and we follow it: what it gives back or unmaps reads as zero from
then on and must not get old content back; what it moves is filled where it is now (`places.py`); a
forked child has the same pages missing, and a userfaultfd of its own, which we are given.

Two changes of the same addresses that two threads make within the same microsecond could be told to
us in the wrong order. MADV_WIPEONFORK and MADV_GUARD_INSTALL on memory that is not filled yet, said
after the restore, are not seen.

Kernel: userfaultfd(2), ioctl_userfaultfd(2); UFFD_EVENT_* are in the order of the changes.
"""

import contextlib
import os
import select
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence

import attrs

from ckpt.engine.fill import iter_stored
from ckpt.engine.lazy_pages import Key, LazyPages
from ckpt.engine.places import Places
from ckpt.errors import RestoreFailed, TargetGone
from ckpt.image.reader import Piece
from ckpt.image.runs import ResolvedRuns
from ckpt.image.workers import Pending, Workers
from ckpt.kernel import userfaultfd
from ckpt.kernel.libc import PAGE_SIZE, readable_address
from ckpt.kernel.userfaultfd import Dropped, Fault, Forked, Message, Moved, UffdFeature
from ckpt.resources.memory import VmaRecord
from ckpt.tracker.spans import join
from ckpt.units import AddrRange, Fd, Pid, RemoteAddr, addr_range

FEATURES = (
    UffdFeature.EVENT_FORK
    | UffdFeature.EVENT_REMAP
    | UffdFeature.EVENT_REMOVE
    | UffdFeature.EVENT_UNMAP
)
LEAST_BYTES = 64 << 10
"""Stored bytes of a mapping below which it is filled at once."""
_AHEAD = 4
"""Frames that are decoded before their turn, at most 1 MiB each."""
_NOT_LAZY = frozenset({"lo", "wf", "dp"})
"""VmFlags of mappings that are filled at once: locked ones are to be there, a child must not be
given what is wiped on fork, and droppable ones cannot be watched."""


def may_wait(vma: VmaRecord) -> bool:
    """Tell whether the pages of a mapping may come while it is used already."""
    return vma.file < 0 and vma.has_own_pages and not _NOT_LAZY & set(vma.flags)


def plan_lazy(
    vmas: Sequence[VmaRecord], runs: ResolvedRuns
) -> tuple[list[AddrRange], list[AddrRange]]:
    """Return the mappings that are filled lazily, and the others, which must be there at once."""
    lazy = [
        stored.vma.span
        for stored in iter_stored(vmas, runs)
        if stored.n_bytes >= LEAST_BYTES and may_wait(stored.vma)
    ]
    chosen = set(lazy)
    others = join([(vma.start, vma.end) for vma in vmas if vma.span not in chosen])
    return lazy, [AddrRange(RemoteAddr(start), RemoteAddr(end)) for start, end in others]


@attrs.define(eq=False, repr=False)
class _Space:
    """One address space: the restored process's, or that of a child that it forked meanwhile."""

    fd: Fd
    places: Places
    forked: bool = False
    """A child has some pages from its parent, so it may be offered what it has."""
    done: set[Key] = attrs.field(factory=set)
    """Frames that are in place."""
    gone: bool = False


@attrs.define(eq=False, repr=False)
class _Ahead:
    """A batch that is fetched before its turn."""

    space: _Space
    key: Key
    pending: Pending[bytes | bytearray]
    is_here: threading.Event


class PageServer:
    """Puts pages in place, asked or not, until all are there."""

    def __init__(self, pages: LazyPages, fd: Fd, spans: Sequence[AddrRange], pid: Pid) -> None:
        """Serve `spans`, which are registered with the userfaultfd `fd`; reads no page yet.

        Args:
            pages: what belongs into `spans`; the rest is zero.
            fd: of the process's memory; closed at the end.
            spans: ascending.
            pid: the process, for errors.
        """
        self._pages = pages
        self._pid = pid
        self._batches: dict[Key, list[Piece]] = dict(pages.iter_batches())
        self._index()
        self._queue: deque[tuple[_Space, Key]] = deque()
        self._ahead: deque[_Ahead] = deque()
        self._here_fd = Fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        """Readable when a batch has been fetched."""
        self._faults: deque[tuple[_Space, int]] = deque()
        self._spaces: list[_Space] = []
        self._add(_Space(fd, Places(spans)))

    def _index(self) -> None:
        by_address = sorted(
            (piece[0], piece[2], key) for key, pieces in self._batches.items() for piece in pieces
        )
        self._starts = [start for start, _, _ in by_address]
        self._ends = [start + length for start, length, _ in by_address]
        self._keys = [key for _, _, key in by_address]

    def _add(self, space: _Space) -> None:
        self._spaces.append(space)
        self._queue.extend((space, key) for key in self._batches)

    def serve_until(self, go: Fd) -> bool:
        """Serve faults only, until there is something to read from `go`.

        Returns:
            False if it was its end: whoever had the other side has failed.
        """
        while True:
            readable = self._poll([go])
            self._serve_faults()
            if go in readable:
                return bool(os.read(go, 1))

    def serve_all(self) -> None:
        """Serve faults and put everything else in place; close the descriptors.

        Raises:
            CkptError: a page cannot be had. Nothing is closed then: who waits for it must go on
                waiting.
        """
        with Workers() as workers:
            while self._prepare(workers):
                self._serve_until_here(self._ahead[0])
                ahead = self._ahead.popleft()
                raw = ahead.pending.wait()
                if not ahead.space.gone and ahead.key not in ahead.space.done:
                    self._put_frame(ahead.space, ahead.key, raw)
        for space in self._spaces:
            os.close(space.fd)
        os.close(self._here_fd)
        self._pages.finish()

    def _prepare(self, workers: Workers) -> bool:
        """Have a few frames decoded; tell whether there is anything left to do."""
        while self._queue and len(self._ahead) < _AHEAD:
            space, key = self._queue.popleft()
            if not space.gone and key not in space.done:
                is_here = threading.Event()
                pending = workers.submit(self._fetching(key, is_here))
                self._ahead.append(_Ahead(space, key, pending, is_here))
        return bool(self._ahead)

    def _fetching(self, key: Key, is_here: threading.Event) -> Callable[[], bytes | bytearray]:
        def fetch() -> bytes | bytearray:
            try:
                return self._pages.fetch(key, awaited=False)
            finally:
                is_here.set()
                os.eventfd_write(self._here_fd, 1)

        return fetch

    def _serve_until_here(self, ahead: _Ahead) -> None:
        """Serve faults until a batch has been fetched: that may take as long as a network does."""
        self._poll([], timeout_s=0)
        self._serve_faults()
        while not ahead.is_here.is_set():
            if self._here_fd in self._poll([self._here_fd]):
                os.eventfd_read(self._here_fd)
            self._serve_faults()

    # -- what happens in the process -------------------------------------------------------------

    def _poll(self, more: list[Fd], timeout_s: float | None = None) -> list[Fd]:
        """Wait for something, read it, follow what has changed, and note the faults."""
        watched = {space.fd: space for space in self._spaces if not space.gone}
        poll = select.poll()
        for fd in (*watched, *more):
            poll.register(fd, select.POLLIN)
        found = poll.poll(None if timeout_s is None else timeout_s * 1000)
        ready = [Fd(fd) for fd, _ in found]
        for fd in ready:
            if fd in watched:
                self._read(watched[fd])
        return ready

    def _read(self, space: _Space) -> None:
        """Read all messages: changes are followed at once, before any fault is served."""
        while messages := userfaultfd.read_messages(space.fd):
            for message in messages:
                self._follow(space, message)

    def _follow(self, space: _Space, message: Message) -> None:
        match message:
            case Fault(address):
                self._faults.append((space, address // PAGE_SIZE * PAGE_SIZE))
            case Dropped(start, end):
                space.places.cut(start, end)
            case Moved(start, to, len_bytes):
                space.places.move(start, to, len_bytes)
            case Forked(fd):
                # What the parent got since then the child may lack, so it is offered everything.
                self._add(_Space(fd, space.places.copy(), forked=True))

    def _serve_faults(self) -> None:
        while self._faults:
            space, address = self._faults.popleft()
            if not space.gone:
                self._serve(space, address)

    def _serve(self, space: _Space, address: int) -> None:
        """Put in place what belongs at `address`, with all of its frame, or a page of zeros.

        A page of a frame that was in place is zero too: the process has given it back in a way
        that is not told (MADV_FREE).
        """
        while not space.gone:
            origin = space.places.origin_of(address)
            key = None if origin is None else self._key_of(origin)
            if key is not None and key not in space.done:
                self._put_frame(space, key, self._pages.fetch(key, awaited=True), origin)
                return
            if self._put_zero(space, address):
                return
            self._read(space)

    def _key_of(self, origin: int) -> Key | None:
        """Return the frame that holds a page of the image; None: it is all zeros."""
        index = bisect_right(self._starts, origin) - 1
        return self._keys[index] if index >= 0 and origin < self._ends[index] else None

    # -- putting pages in place ------------------------------------------------------------------

    def _put_frame(
        self, space: _Space, key: Key, raw: bytes | bytearray, first: int | None = None
    ) -> None:
        """Put the pages of a frame where they belong now, the one with `first` before others."""
        base, _ = readable_address(raw)
        pieces = self._batches[key]
        if first is not None:
            pieces = sorted(pieces, key=lambda piece: not piece[0] <= first < piece[0] + piece[2])
        try:
            for origin, offset, len_bytes in pieces:
                self._put_piece(space, origin, base + offset, len_bytes)
        except TargetGone:
            space.gone = True
        space.done.add(key)

    def _put_piece(self, space: _Space, origin: int, source: int, len_bytes: int) -> None:
        done = 0
        while done < len_bytes:
            spot = space.places.find(origin + done, len_bytes - done)
            if spot is None:
                return
            skipped, address, wanted = spot
            settled = self._copy(space, address, source + done + skipped, wanted)
            if settled:
                done += skipped + settled
            else:
                self._read(space)

    def _copy(self, space: _Space, address: int, source: int, len_bytes: int) -> int:
        """Return how many bytes are settled: in place now, or already, or no longer mapped.

        0: the process is changing its mappings, of which a message tells.

        Raises:
            RestoreFailed: something else is there, which cannot be.
        """
        try:
            return userfaultfd.copy(space.fd, RemoteAddr(address), source, len_bytes, pid=self._pid)
        except FileExistsError as error:
            if not space.forked:
                raise RestoreFailed("filling memory", f"{address:#x} is filled already") from error
            return PAGE_SIZE
        except FileNotFoundError:
            # Not all of it is in one mapping that is watched: it was split, or something else is
            # there now.
            if len_bytes == PAGE_SIZE:
                return PAGE_SIZE
            half = len_bytes // PAGE_SIZE // 2 * PAGE_SIZE
            return self._copy(space, address, source, half)

    def _put_zero(self, space: _Space, address: int) -> bool:
        span = addr_range(RemoteAddr(address), PAGE_SIZE)
        try:
            return userfaultfd.zeropage(space.fd, span, pid=self._pid) > 0
        except TargetGone:
            space.gone = True
        except (FileExistsError, FileNotFoundError):
            with contextlib.suppress(TargetGone):
                userfaultfd.wake(space.fd, span, pid=self._pid)
        return True
