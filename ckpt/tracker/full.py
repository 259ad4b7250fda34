"""The honest fallback: nothing is known, so everything counts as written."""

import attrs

from ckpt.kernel.features import Features
from ckpt.tracker.base import Scan, TrackerName
from ckpt.tracker.populated import opened_pagemap, scan_populated
from ckpt.tracker.spans import Own, Spans
from ckpt.units import Pid


@attrs.frozen(slots=True, repr=False)
class Full:
    """See `base.Tracker`."""

    features: Features
    name: TrackerName = TrackerName.FULL

    def peek(self, pid: Pid, own: Own) -> Spans:
        """See `base.Tracker.peek`: everything."""
        return self.collect(pid, own, []).populated

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
            return Scan.of(scan_populated(fd, own, self.features), [])
