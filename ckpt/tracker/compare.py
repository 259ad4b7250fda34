"""No tracker at all: each page is compared with what the parent generation holds of it.

Reads everything, and all of it while the target is frozen, but needs nothing of the kernel and
cannot be wrong: the comparison is of the bytes, not of a hash.
"""

import attrs

from ckpt.kernel.features import Features
from ckpt.tracker.base import Scan, TrackerName
from ckpt.tracker.populated import opened_pagemap, scan_populated
from ckpt.tracker.spans import Own, Spans
from ckpt.units import Pid


@attrs.frozen(slots=True)
class Compare:
    """See `base.Tracker`; that nothing is clean makes the engine read, and compare, all pages."""

    features: Features
    name: TrackerName = TrackerName.COMPARE

    def peek(self, pid: Pid, own: Own) -> Spans:
        """See `base.Tracker.peek`: everything."""
        return self.collect(pid, own, []).populated

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
            return Scan(scan_populated(fd, own, self.features), [])


def equal_pages(now: memoryview, before: memoryview, page_size: int) -> list[bool]:
    """Tell for each page of two equally long buffers whether its bytes are the same."""
    import numpy as np

    words = page_size // 8
    left = np.frombuffer(now, dtype=np.uint64).reshape(-1, words)
    right = np.frombuffer(before, dtype=np.uint64).reshape(-1, words)
    return list((left == right).all(axis=1))
