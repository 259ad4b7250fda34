"""What every dirty-page tracker offers, whatever the kernel has.

A tracker is asked once per dump, while the target is frozen, and its answer means: of the pages
that exist, these are certainly as they were at the epoch. Everything else counts as written. It is
armed again in the same step. `epoch.py` tells whether its answer may be believed.
"""

import enum
from typing import Protocol

import attrs

from ckpt.tracker.spans import Own, Spans
from ckpt.units import Pid


class TrackerName(enum.StrEnum):
    """The trackers, as `--tracker` and the manifest spell them."""

    SOFTDIRTY = "softdirty"
    WRITEPROTECT = "writeprotect"
    COMPARE = "compare"
    FULL = "full"


@attrs.frozen(slots=True)
class Scan:
    """What a tracker saw of the private memory of a frozen process."""

    populated: Spans
    """Pages whose content is the process's own."""
    clean: Spans
    """Those of them that nobody has written since the epoch."""


class Tracker(Protocol):
    """A way to learn which pages were written since the last generation."""

    @property
    def name(self) -> TrackerName:
        """Which one it is."""

    def collect(self, pid: Pid, own: Own) -> Scan:
        """Return what was written in the private mappings `own` since the epoch, and re-arm.

        State:  target frozen. Pages must be read after this call, not before.
        Shape:  the result: ascending, disjoint, page aligned byte ranges.

        Raises:
            TargetGone: the process ended.
        """
