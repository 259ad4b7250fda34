"""The honest fallback: nothing is known, so everything counts as written."""

import attrs

from ckpt.kernel.features import Features
from ckpt.tracker.base import Scan, TrackerName
from ckpt.tracker.populated import opened_pagemap, scan_populated
from ckpt.tracker.spans import Own
from ckpt.units import Pid


@attrs.frozen(slots=True)
class Full:
    """See `base.Tracker`."""

    features: Features
    name: TrackerName = TrackerName.FULL

    def collect(self, pid: Pid, own: Own) -> Scan:
        """See `base.Tracker.collect`."""
        with opened_pagemap(pid) as fd:
            return Scan(scan_populated(fd, own, self.features), [])
