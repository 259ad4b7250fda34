"""Soft-dirty bits: the kernel's first way to track writes (CONFIG_MEM_SOFT_DIRTY, Linux 3.11).

Reading the bits and clearing them are two steps, so the target must be frozen in between, and
another process that writes into it then (process_vm_writev) would be missed. New and remapped
mappings read as dirty by themselves, but for page tables that were moved whole (`frames`) and for
mappings that were merged (`layout`).

Kernel: Documentation/admin-guide/mm/soft-dirty.rst; /proc/PID/clear_refs; bit 55 of
/proc/PID/pagemap, or PAGEMAP_SCAN with PAGE_IS_SOFT_DIRTY.
"""

import attrs

from ckpt.kernel import clear_refs, pagemap
from ckpt.kernel.features import Features
from ckpt.tracker import frames, layout
from ckpt.tracker.base import Scan, TrackerName
from ckpt.tracker.populated import iter_chunks, iter_ranges, opened_pagemap, scan_populated
from ckpt.tracker.spans import Own, Spans, intersect, join, subtract
from ckpt.units import Fd, Pid


@attrs.frozen(slots=True, repr=False)
class SoftDirty:
    """See `base.Tracker`."""

    features: Features
    name: TrackerName = TrackerName.SOFTDIRTY

    def peek(self, pid: Pid, own: Own) -> Spans:
        """See `base.Tracker.peek`."""
        with opened_pagemap(pid) as fd:
            anonymous = Own(own.anonymous, [])
            dirty = self._scan_dirty(fd, anonymous.all)
            return intersect(dirty, scan_populated(fd, anonymous, self.features))

    def watches_all(self, pid: Pid, own: Own) -> bool:
        """See `base.Tracker.watches_all`."""
        del pid, own
        return True

    def watch(self, pid: Pid, own: Own) -> None:
        """See `base.Tracker.watch`: nothing is to be done."""

    def collect(
        self,
        pid: Pid,
        own: Own,
        likely: Spans,  # noqa: ARG002
        *,
        running: bool = False,  # noqa: ARG002
    ) -> Scan:
        """See `base.Tracker.collect`."""
        with opened_pagemap(pid) as fd:
            dirty = self._scan_dirty(fd, own.all)
            clear_refs.clear_soft_dirty(pid)
            populated = scan_populated(fd, own, self.features)
            mappings = layout.read_layout(pid)
            steady = layout.steady(layout.take(pid), mappings)
            unwritten = intersect(subtract(populated, dirty), steady)
            clean, witnesses = frames.confirm(
                frames.table_reader(fd), populated, unwritten, frames.take(pid)
            )
        frames.note(pid, witnesses)
        layout.note(pid, mappings)
        return Scan.of(populated, clean)

    def _scan_dirty(self, fd: Fd, own: Spans) -> Spans:
        dirty: Spans = []
        if self.features.pagemap_scan_soft_dirty:
            for span in iter_ranges(own):
                dirty += pagemap.scan_soft_dirty(fd, span)
        else:
            for span in iter_chunks(own):
                entries = pagemap.read_entries(fd, span)
                # Entries cannot tell the shared zero page (MADV_DONTNEED, then a read: not dirty)
                # from content. It is never mapped exclusively; nor is what was shared by a fork,
                # which is then stored once more than it had to be.
                doubtful = pagemap.soft_dirty(entries) | ~pagemap.exclusive(entries)
                dirty += pagemap.runs_of(doubtful, span.start)
        return join(dirty)
