"""Pages that processes of a tree share until one of them writes: stored once.

    parent   [A][B][C]     one page frame each; after a fork those of the child are the same
    child    [A][X][C]     X was written: a frame of its own
    stored   A B C X       the child's A and C are said to be the parent's (`pages.Alias`)

/proc/PID/pagemap tells the frame of each page. What is done in which order makes it right:

    1  scan     each process is scanned: what it changes from now on, its next scan tells
    2  look     where two have one frame, one of them (the source) is to be read for both: a guess
    3  read     what is left
    4  confirm  they still have one frame
    5  scan     of the source: where it is not as it was in 1, the other one forgets its page

What was read of the source is what it had from 1 to 5, so also in 4, where the other one had the
same frame, thus the same bytes; and what that one changes after 1 its own last scan tells, as for
any page that was read while it ran. Nothing more is supposed: not that the frame is shared by a
fork, so neither merged pages (KSM) nor the zero page matter, nor what mremap moves. While all stand
still 4 follows 1 at once, and there is no 5; write protection tells 5 at once (`unwritten`).

4 is two readings, one after the other, and the kernel moves pages about (compaction). A frame that
is mapped only once does not count, and it must be the same in 2 and in 4: a page would have to
leave its frame to a page at the same address of another process, twice, at these moments.

Pages in swap and of hugetlbfs have no frame here; those of transparent huge pages do.

In a delta what the parent generation holds of a process is left there. If a new child shares it, it
is stored once more, for both: page spaces are of one process, and only the same position in the
same stream is known to be the same page when it is restored (`inheriting`).

Frames are shown to CAP_SYS_ADMIN only; without it nothing is shared, nor without PAGEMAP_SCAN or
numpy. 8 bytes a page are compared, and nothing is done page by page.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import attrs

from ckpt.engine.copying import Copy
from ckpt.engine.members import Member
from ckpt.engine.stream import Alias, all_copied
from ckpt.errors import TargetGone
from ckpt.kernel import pagemap
from ckpt.kernel.features import Features
from ckpt.kernel.libc import PAGE_SIZE
from ckpt.tracker.populated import opened_pagemap
from ckpt.tracker.spans import Spans, intersect, join, subtract, total_bytes
from ckpt.units import AddrRange, Fd, Pid, RemoteAddr

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WORTH_BYTES = 1 << 20
"""What must be left to read for looking to be worth its while."""
_CELL_BYTES = 32 << 20
"""How much of the address space is looked at in one go, in all processes."""
_STORED, _WANTED, _KNOWN, _NOT = range(4)
"""What a page is to a process: in this stream; about to be read; in the parent generation."""


@attrs.frozen(eq=False, repr=False)
class Wanting:
    """A process, and what of it is about to be read."""

    member: Member
    pid: Pid
    """Whose page tables are asked: its own, or those of its clone."""
    wanted: Spans


@attrs.frozen(eq=False, repr=False)
class Guess:
    """Two processes with the same frames."""

    of: Wanting
    source: Wanting
    spans: Spans


@attrs.define(eq=False, repr=False)
class Found:
    """What was found in one look."""

    guesses: list[Guess] = attrs.Factory(list)
    _left: dict[Pid, tuple[Spans, Spans]] = attrs.Factory(dict)

    def left_of(self, member: Member, wanted: Spans) -> tuple[Spans, Spans]:
        """Return what must be read of a process itself: what it has alone, what others have too.

        process_vm_readv pins what it reads, and for that the kernel gives the reader's victim a
        copy of its own of each page that is shared on write (FAULT_FLAG_UNSHARE, Linux 5.19): the
        tree would grow by being read. Reading /proc/PID/mem does not.
        """
        return self._left.get(member.pid, (wanted, []))


@attrs.define(eq=False, repr=False)
class Sharing:
    """Finds what the processes of one dump share."""

    copy: Copy
    features: Features
    stores_once: bool = True
    """Otherwise it only sees to it that what is shared is still so when it was read."""
    _loaded: bool = False
    _unsettled: list[tuple[Member, Member, Spans]] = attrs.Factory(list)
    """(who, of whom it was read, what): confirmed, before the source's next scan."""

    def prepare(self, n_bytes: int, n_processes: int) -> None:
        """Load what looking needs, where it could be worth it: that takes 0.1 s."""
        able = self.features.pagemap_scan and "sys_admin" in self.features.capabilities
        if self._loaded or not able or n_processes < 2 or n_bytes < WORTH_BYTES:
            return
        with contextlib.suppress(ImportError):
            import numpy as np  # noqa: F401

            self._loaded = True

    def look(self, wanting: Sequence[Wanting], *, guess: bool = True) -> Found:
        """Return who has the same frames as somebody else, who has been or will be read.

        State:  all have been scanned.

        Args:
            wanting: everybody.
            guess: whether nothing must be read that is read of somebody else.
        """
        wanted = join(span for one in wanting for span in one.wanted)
        n_bytes = sum(total_bytes(one.wanted) for one in wanting)
        if not self._loaded or len(wanting) < 2 or n_bytes < WORTH_BYTES:
            return Found()
        pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
        with contextlib.suppress(TargetGone), contextlib.ExitStack() as stack:
            tables = [
                _Table(n, stack.enter_context(opened_pagemap(one.pid)), self._kinds_of(one))
                for n, one in enumerate(wanting)
            ]
            for cell in _iter_cells(wanted):
                _look_at(cell, [table for table in tables if table.reaches(cell)], pairs)
            if not (guess and self.stores_once):
                pairs.clear()
            found = {(own, source): join(spans) for (own, source), spans in pairs.items()}
            left = {}
            for one, table in zip(wanting, tables, strict=True):
                guessed = [spans for (own, _), spans in found.items() if own == table.number]
                rest = subtract(one.wanted, join(span for spans in guessed for span in spans))
                shared = join(table.shared)
                left[one.member.pid] = (subtract(rest, shared), intersect(rest, shared))
            guesses = [
                Guess(wanting[own], wanting[of], spans) for (own, of), spans in found.items()
            ]
            return Found(guesses, left)
        return Found()

    def _kinds_of(self, one: Wanting) -> list[Spans]:
        held = one.member.held.pages
        stored = intersect(held, all_copied(self.copy.stream, one.member.space))
        return [stored, one.wanted, subtract(held, stored)]

    def confirm(self, found: Found, *, running: bool) -> None:
        """Hold what is still shared, and was read of the source, without reading it again.

        Args:
            found: the sources have been read since.
            running: the processes are not frozen, and no clones.
        """
        for guess in found.guesses:
            source, member = guess.source.member, guess.of.member
            with contextlib.suppress(TargetGone):
                spans = intersect(_still_shared(guess), source.held.pages)
                unwritten = source.tracking.unwritten(spans) if running else spans
                if unwritten is None:
                    self._unsettled.append((member, source, spans))
                else:
                    spans = intersect(spans, unwritten)
                self.copy.stream.append(Alias(member.space, spans, source.space))
                member.held.add(spans)

    @property
    def is_unsettled(self) -> bool:
        """Whether `settle` has anything to do."""
        return bool(self._unsettled)

    def settle(self, scanned: Iterable[Member]) -> None:
        """Have all forget what was read of a source that was written then, or meanwhile.

        State:  `Held.see` has been told of the scans; who ended was not scanned.
        """
        alive = {id(member) for member in scanned}
        for member, source, spans in self._unsettled:
            right = intersect(spans, source.held.pages) if id(source) in alive else []
            member.held.forget(subtract(spans, right))
        self._unsettled.clear()


class _Table:
    """The page tables of one process, and what its pages are to it."""

    def __init__(self, number: int, fd: Fd, kinds: Sequence[Spans]) -> None:
        self.number = number
        self._fd = fd
        self._kinds = list(zip((_STORED, _WANTED, _KNOWN), kinds, strict=True))
        self._all = join(span for spans in kinds for span in spans)
        self.shared: list[tuple[int, int]] = []
        """What is wanted, and not the process's alone, as far as was looked."""

    def reaches(self, cell: AddrRange) -> bool:
        return bool(intersect([(cell.start, cell.end)], self._all))

    def read(self, cell: AddrRange) -> "npt.NDArray[np.uint64]":
        """Return for each page its frame and what it is, in one number; 0 if it does not count."""
        import numpy as np

        n_pages = cell.len_bytes // PAGE_SIZE
        kinds = np.full(n_pages, _NOT, dtype=np.uint64)
        for kind, spans in self._kinds:
            for start, end in intersect([(cell.start, cell.end)], spans):
                first = (start - cell.start) // PAGE_SIZE
                kinds[first : first + (end - start) // PAGE_SIZE] = kind
        frames = _frames(self._fd, cell)
        self.shared += pagemap.runs_of((frames != 0) & (kinds == _WANTED), cell.start)
        keys: npt.NDArray[np.uint64] = frames << np.uint64(2) | kinds
        keys[(frames == 0) | (kinds == _NOT)] = 0
        return keys


def _frames(fd: Fd, span: AddrRange) -> "npt.NDArray[np.uint64]":
    import numpy as np

    frames = np.zeros(span.len_bytes // PAGE_SIZE, dtype=np.uint64)
    entries = pagemap.read_entries(fd, span)
    frames[: len(entries)] = pagemap.shared_frames(entries)
    return frames


def _look_at(
    cell: AddrRange, tables: Sequence[_Table], pairs: dict[tuple[int, int], list[tuple[int, int]]]
) -> None:
    """Find who shares in one part of the address space: the pages of a frame stand together."""
    import numpy as np

    keys = np.stack([table.read(cell) for table in tables])
    # Of those with one frame the first is who is read: best who has been, else who is to be.
    order = np.argsort(keys, axis=0, kind="stable")
    keys = np.take_along_axis(keys, order, axis=0)
    frames, kinds = keys >> np.uint64(2), keys & np.uint64(3)
    first, first_kind = order[0], kinds[0]
    sources = np.full(order.shape, -1, dtype=np.int64)
    columns = np.arange(order.shape[1])
    for row in range(1, len(tables)):
        same = (frames[row] == frames[row - 1]) & (frames[row] != 0)
        first = np.where(same, first, order[row])
        first_kind = np.where(same, first_kind, kinds[row])
        hit = same & (first_kind <= _WANTED) & (kinds[row] != _STORED)
        sources[order[row][hit], columns[hit]] = first[hit]
    for own, table in enumerate(tables):
        for source in np.unique(sources[own]).tolist():
            if source >= 0:
                spans = pagemap.runs_of(sources[own] == source, cell.start)
                pairs.setdefault((table.number, tables[source].number), []).extend(spans)


def _still_shared(guess: Guess) -> Spans:
    spans: Spans = []
    with opened_pagemap(guess.of.pid) as left_fd, opened_pagemap(guess.source.pid) as right_fd:
        for span in _iter_pieces(guess.spans):
            left, right = _frames(left_fd, span), _frames(right_fd, span)
            spans += pagemap.runs_of((left == right) & (left != 0), span.start)
    return join(spans)


def _iter_cells(wanted: Spans) -> Iterator[AddrRange]:
    """Yield parts of the address space, ascending, that hold all that is wanted."""
    done = 0
    for start, end in wanted:
        at = max(start, done)
        while at < end:
            cell = at // _CELL_BYTES * _CELL_BYTES
            done = cell + _CELL_BYTES
            yield AddrRange(RemoteAddr(max(cell, at)), RemoteAddr(done))
            at = done


def _iter_pieces(spans: Spans) -> Iterator[AddrRange]:
    for start, end in spans:
        for at in range(start, end, _CELL_BYTES):
            yield AddrRange(RemoteAddr(at), RemoteAddr(min(at + _CELL_BYTES, end)))
