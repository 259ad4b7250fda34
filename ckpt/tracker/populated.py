"""Which pages exist, asked the best way that this kernel offers."""

import contextlib
import os
from collections.abc import Iterator

from ckpt.kernel import pagemap
from ckpt.kernel.features import Features
from ckpt.tracker.spans import Own, Spans, join
from ckpt.units import AddrRange, Fd, Pid, RemoteAddr

_CHUNK_BYTES = 1 << 30
"""How much address space one read of pagemap covers: 2 MiB of entries."""


@contextlib.contextmanager
def opened_pagemap(pid: Pid) -> Iterator[Fd]:
    """Lend /proc/PID/pagemap."""
    fd = pagemap.open_pagemap(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def iter_ranges(spans: Spans) -> Iterator[AddrRange]:
    """Walk spans as address ranges."""
    return (AddrRange(RemoteAddr(start), RemoteAddr(end)) for start, end in spans)


def iter_chunks(spans: Spans) -> Iterator[AddrRange]:
    """Walk spans as address ranges of at most 1 GiB, for reading pagemap entries."""
    for start, end in spans:
        for at in range(start, end, _CHUNK_BYTES):
            yield AddrRange(RemoteAddr(at), RemoteAddr(min(at + _CHUNK_BYTES, end)))


def scan_populated(fd: Fd, own: Own, features: Features) -> Spans:
    """Return the pages inside `own` whose content is the process's own."""
    found: Spans = []
    if features.pagemap_scan:
        for span in iter_ranges(own.anonymous):
            found += pagemap.scan_populated_private(fd, span, of_file=False)
        for span in iter_ranges(own.mapped):
            found += pagemap.scan_populated_private(fd, span)
    else:
        for span in iter_chunks(own.all):
            entries = pagemap.read_entries(fd, span)
            found += pagemap.runs_of(pagemap.populated_private(entries), span.start)
    return join(found)


def scan_written(fd: Fd, spans: Spans) -> Spans:
    """Return the pages of anonymous mappings that write-protection shows to be written.

    Changes nothing, and is out of date at once while the target runs: for an estimate.
    """
    found: Spans = []
    for span in iter_ranges(spans):
        regions = pagemap.scan(
            fd,
            span,
            category_mask=pagemap.PAGE_IS_WRITTEN,
            category_anyof_mask=pagemap.PAGE_IS_PRESENT | pagemap.PAGE_IS_SWAPPED,
            return_mask=pagemap.PAGE_IS_WRITTEN,
        )
        found += [(start, end) for start, end, _ in regions]
    return found
