"""Write protection by userfaultfd, resolved by the kernel itself (WP_ASYNC, Linux 6.7).

The userfaultfd belongs to the target's address space, so it is made *inside* the target by a remote
call, fetched with pidfd_getfd, and closed there. PAGEMAP_SCAN with PM_SCAN_WP_MATCHING returns the
written pages and protects them again in one step for each page, so nothing is lost even to a writer
outside the frozen process. Between two dumps a keeper holds the descriptor (`process/keeper.py`).

A mapping that is new, moved, or made by an exec is not registered, and reads as written. Only
pages that exist are protected: a hole that is touched later reads as written without that, and
markers in a sparse mapping of 64 GiB would cost 128 MiB of page tables.

Kernel: userfaultfd(2), ioctl_userfaultfd(2), Documentation/admin-guide/mm/pagemap.rst.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import attrs

from ckpt.errors import CkptError, NotPermitted, TargetGone
from ckpt.image.workers import DEFAULT_THREADS, iter_ahead
from ckpt.kernel import pagemap, userfaultfd
from ckpt.kernel.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_PFNZERO,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_IS_WPALLOWED,
    PAGE_IS_WRITTEN,
    PM_SCAN_WP_MATCHING,
    Region,
)
from ckpt.kernel.pagemap_burst import ScanBurst
from ckpt.kernel.procfs import maps
from ckpt.kernel.userfaultfd import UffdFeature
from ckpt.process.arena import Arena
from ckpt.process.task import Task
from ckpt.process.userfault import make_inside_each
from ckpt.tracker.base import Scan, TrackerName
from ckpt.tracker.populated import iter_ranges, opened_pagemap, scan_written
from ckpt.tracker.spans import Own, Spans, intersect, join, subtract, unite
from ckpt.units import AddrRange, Fd, Pid, RemoteAddr

_DENSE_BYTES = 1 << 21
"""Shorter spans are not worth a scan of their own."""

_PIECE_BYTES = 256 << 20
_WORTH_THREADS = 4
"""Pieces, from which on threads save more than they cost to start."""

_FEATURES = UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED | UffdFeature.WP_HUGETLBFS_SHMEM


@attrs.define(slots=True, eq=False, repr=False)
class WriteProtect:
    """See `base.Tracker`. Owns its descriptor: `close` ends that."""

    fd: Fd
    name: TrackerName = TrackerName.WRITEPROTECT

    def close(self) -> None:
        """Close our descriptor; tracking goes on as long as a keeper has another."""
        os.close(self.fd)

    def _register(self, pid: Pid, span: AddrRange) -> None:
        try:
            userfaultfd.register(self.fd, span, userfaultfd.UFFDIO_REGISTER_MODE_WP, pid=pid)
        except TargetGone:
            raise
        except (OSError, CkptError):
            # EBUSY, EINVAL: a mapping of the target's own userfaultfd, or one that cannot be
            # watched. It is never believed to be clean, so nothing is lost.
            return

    def peek(self, pid: Pid, own: Own) -> Spans:
        """See `base.Tracker.peek`."""
        with opened_pagemap(pid) as fd:
            return scan_written(fd, own.anonymous)

    def unwritten(self, pid: Pid, spans: Spans) -> Spans:
        """Return which pages of `spans` were not written since the last `collect`.

        State:  any; changes nothing.

        Raises:
            TargetGone: the process ended.
        """
        found: Spans = []
        with opened_pagemap(pid) as fd:
            for span in iter_ranges(spans):
                regions = pagemap.scan(
                    fd,
                    span,
                    category_mask=PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN,
                    category_inverted=PAGE_IS_WRITTEN,
                    category_anyof_mask=PAGE_IS_PRESENT,
                    return_mask=PAGE_IS_PRESENT,
                )
                found += [(start, end) for start, end, _ in regions]
        return join(found)

    def watches_all(self, pid: Pid, own: Own) -> bool:
        """See `base.Tracker.watches_all`."""
        with opened_pagemap(pid) as fd:
            return not any(_has_unwatched(fd, span) for span in iter_ranges(own.all))

    def watch(self, pid: Pid, own: Own) -> None:
        """See `base.Tracker.watch`."""
        with opened_pagemap(pid) as fd:
            stale = _find_stale(fd, own)
        self._register_all(pid, own)
        self._write_protect_all(pid, stale, 0)

    def _register_all(self, pid: Pid, own: Own) -> None:
        # Never while the target runs: a span that is not (any more) a whole mapping would split
        # one, and the target's own mremap across the two parts would fail.
        spans = list(iter_ranges(own.all))
        mode = userfaultfd.UFFDIO_REGISTER_MODE_WP
        done = userfaultfd.try_register_each(self.fd, spans, mode)
        for mapping in _refused(pid, spans, done):
            self._register(pid, mapping)

    def collect(self, pid: Pid, own: Own, likely: Spans, *, running: bool = False) -> Scan:
        """See `base.Tracker.collect`."""
        dense = [
            (start, end)
            for start, end in intersect(_dense(own.anonymous), _dense(likely))
            if end - start >= _DENSE_BYTES
        ]
        sparse = Own(subtract(own.anonymous, dense), own.mapped)
        with opened_pagemap(pid) as fd:
            written, odd = _ask_dense(fd, dense, 1 if running else DEFAULT_THREADS)
            written += _protect(fd, sparse)
            seen = _look(fd, Own(join([*sparse.anonymous, *odd]), sparse.mapped))
        if not running:
            # After they were looked at: what is new now was not protected until now.
            self._register_all(pid, own)
            self._write_protect_all(pid, seen.unwatched, userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP)

        def order() -> tuple[Spans, Spans]:
            whole = subtract(dense, odd)
            spans = join((start, end) for start, end, _ in written)
            unwritten = subtract(unite(seen.unwritten, whole), spans)
            return unite(seen.populated, whole), unwritten

        return Scan(order)

    def _write_protect_all(self, pid: Pid, spans: Spans, mode: int) -> None:
        ranges = list(iter_ranges(spans))
        done = userfaultfd.try_write_protect_each(self.fd, ranges, mode)
        for mapping in _refused(pid, ranges, done):
            self._write_protect(pid, mapping, mode)

    def _write_protect(self, pid: Pid, span: AddrRange, mode: int) -> None:
        # Not by PAGEMAP_SCAN, which would take stale marks (`_find_stale`) for protection. This
        # sets both, or takes both away.
        with contextlib.suppress(OSError, NotPermitted):  # see _register
            userfaultfd.write_protect(self.fd, span, mode, pid=pid)


def _refused(pid: Pid, spans: list[AddrRange], done: list[bool]) -> Iterator[AddrRange]:
    """Walk what lies in spans that were refused, mapping by mapping.

    One that cannot be watched has its neighbours refused, too, or those behind it.
    """
    refused: Spans = [
        (span.start, span.end) for span, is_done in zip(spans, done, strict=True) if not is_done
    ]
    if refused:
        mappings: Spans = [(vma.span.start, vma.span.end) for vma in maps.read_maps(pid)]
        yield from iter_ranges(intersect(mappings, refused))


@attrs.frozen(slots=True, repr=False)
class _Seen:
    populated: Spans
    unwritten: Spans
    """Pages that are protected, in mappings that are registered."""
    unwatched: Spans
    """Pages in mappings that are not registered."""


def _iter_absent(own: Own) -> Iterator[tuple[AddrRange, int]]:
    """Walk the mappings, each with the categories of what is no page of the process's own."""
    for span in iter_ranges(own.anonymous):
        yield span, PAGE_IS_PFNZERO
    for span in iter_ranges(own.mapped):
        yield span, PAGE_IS_PFNZERO | PAGE_IS_FILE


def _has_unwatched(fd: Fd, span: AddrRange) -> bool:
    return bool(
        pagemap.scan(
            fd,
            span,
            category_inverted=PAGE_IS_WPALLOWED,
            category_mask=PAGE_IS_WPALLOWED,
            category_anyof_mask=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask=PAGE_IS_PRESENT,
            max_pages=1,
        )
    )


def _find_stale(fd: Fd, own: Own) -> Spans:
    """Return pages that have the mark of protection and can be written.

    A mapping that lost its registration keeps the marks: it was moved (before Linux 6.14), or a
    neighbour that it had been merged with. Registered again, they would pass for unwritten.
    """
    stale: Spans = []
    for span in iter_ranges(own.all):
        regions = pagemap.scan(
            fd,
            span,
            category_mask=PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN,
            category_inverted=PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN,
            category_anyof_mask=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask=PAGE_IS_PRESENT,
        )
        stale += [(start, end) for start, end, _ in regions]
    return join(stale)


def _dense(spans: Spans) -> Spans:
    """Return those that can have a dense part; of many scattered pages that is quick to see."""
    return [span for span in spans if span[1] - span[0] >= _DENSE_BYTES]


def _ask_dense(fd: Fd, dense: Spans, n_threads: int) -> tuple[list[Region], Spans]:
    """Ask for all of `dense`, where there are hardly holes, in pieces: written, and odd ones.

    A frozen target leaves its processors to us, so that `n_threads` divide the time.
    """
    pieces = list(_iter_pieces(dense))
    ask = partial(_ask_piece, fd)
    answers: Iterator[tuple[list[Region], Spans]] = map(ask, pieces)
    if n_threads > 1 and len(pieces) >= _WORTH_THREADS:
        answers = (answer for _, answer in iter_ahead(ask, pieces, n_threads))
    written: list[Region] = []
    odd: Spans = []
    for regions, spans in answers:
        written += regions
        odd += spans
    return written, join(odd)


def _iter_pieces(spans: Spans) -> Iterator[AddrRange]:
    for start, end in spans:
        for at in range(start, end, _PIECE_BYTES):
            yield AddrRange(RemoteAddr(at), RemoteAddr(min(at + _PIECE_BYTES, end)))


def _ask_piece(fd: Fd, span: AddrRange) -> tuple[list[Region], Spans]:
    return _protect_dense(fd, span), _find_odd(fd, span)


def _protect_dense(fd: Fd, span: AddrRange) -> list[Region]:
    """Return the pages that were written and protect them again, where there are hardly holes.

    Asked for nothing else, the kernel is twice as quick (0.4 against 0.8 ms in 1 GiB), but counts
    a hole as written, and arms it; a mapping that is not registered it skips.
    """
    return pagemap.scan(
        fd,
        span,
        category_mask=PAGE_IS_WRITTEN,
        return_mask=PAGE_IS_WRITTEN,
        flags=PM_SCAN_WP_MATCHING,
    )


def _find_odd(fd: Fd, span: AddrRange) -> Spans:
    """Return what is no page in memory, or not registered: few, so that little has to be told.

    (Telling all pages, as `_look` does, takes four times as long: 4.1 against 1.0 ms in 1 GiB.)
    """
    regions = pagemap.scan(
        fd,
        span,
        category_inverted=PAGE_IS_PRESENT | PAGE_IS_WPALLOWED,
        category_anyof_mask=PAGE_IS_PRESENT | PAGE_IS_WPALLOWED,
        return_mask=PAGE_IS_PRESENT,
    )
    return [(start, end) for start, end, _ in regions]


def _protect(fd: Fd, own: Own) -> list[Region]:
    """Return the pages that were written and protect them again, in one step."""
    burst = ScanBurst(fd)
    for span, absent in _iter_absent(own):
        burst.scan(
            span,
            category_mask=PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN | absent,
            category_inverted=absent,
            category_anyof_mask=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask=PAGE_IS_WRITTEN,
            flags=PM_SCAN_WP_MATCHING,
        )
    return list(chain.from_iterable(burst.collect()))


def _look(fd: Fd, own: Own) -> _Seen:
    """Return which pages exist, and what is known of them."""
    burst = ScanBurst(fd)
    for span, absent in _iter_absent(own):
        burst.scan(
            span,
            category_mask=absent,
            category_inverted=absent,
            category_anyof_mask=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask=PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN | PAGE_IS_SWAPPED,
        )
    # One step for each range, of which there may be very many.
    found: defaultdict[int, Spans] = defaultdict(list)
    for start, end, categories in chain.from_iterable(burst.collect()):
        found[categories].append((start, end))

    def those(mask: int, wanted: int) -> Spans:
        alike = [spans for categories, spans in found.items() if categories & mask == wanted]
        return join(chain.from_iterable(alike))

    exists = those(PAGE_IS_SWAPPED, 0)
    protected = those(PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN, PAGE_IS_WPALLOWED)
    if in_swap := those(PAGE_IS_SWAPPED, PAGE_IS_SWAPPED):
        exists = unite(exists, join(pagemap.drop_markers(fd, in_swap)))
        # MADV_DONTNEED of a private file mapping leaves a marker that looks protected: no page.
        protected = intersect(protected, exists)
    return _Seen(exists, protected, those(PAGE_IS_WPALLOWED, 0))


def create_inside(pid: Pid, arena: Arena, task: Task) -> WriteProtect:
    """Return what `create_each_inside` does, for one."""
    return create_each_inside([(pid, arena, task)])[0]


def create_each_inside(wanted: Sequence[tuple[Pid, Arena, Task]]) -> list[WriteProtect]:
    """Make a userfaultfd for each target's address space; their own descriptors stay as they were.

    Raises:
        FeatureMissing: the kernel refused one of the steps.
        TargetGone: one of the targets has ended.
    """
    if not wanted:
        return []
    fds = make_inside_each(
        wanted,
        _FEATURES,
        user_faults_only=True,
        remedy="use --tracker softdirty, compare or full",
    )
    return list(map(WriteProtect, fds))
