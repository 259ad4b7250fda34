"""What every dirty-page tracker offers, whatever the kernel has.

A tracker's answer means: of the pages that exist, these are certainly as they were when it was
asked before. Everything else counts as written. It is armed again in the same step. The last answer
of a dump is given while the target is frozen; those before it are for the rounds that copy while it
runs. `epoch.py` tells whether the first answer may be believed.
"""

import enum
from collections.abc import Callable
from functools import cached_property
from typing import Protocol, Self

import attrs

from ckpt.tracker.spans import Own, Spans
from ckpt.units import Pid


class TrackerName(enum.StrEnum):
    """The trackers, as `--tracker` and the manifest spell them."""

    SOFTDIRTY = "softdirty"
    WRITEPROTECT = "writeprotect"
    COMPARE = "compare"
    FULL = "full"


TELLING = frozenset({TrackerName.SOFTDIRTY, TrackerName.WRITEPROTECT})
"""Those that ever call a page clean: for the others copying before the freeze saves nothing."""
LIVE = frozenset({TrackerName.WRITEPROTECT})
"""Those whose `collect` misses nothing that is written while it is at work."""


@attrs.define(slots=False, eq=False, repr=False)
class Scan:
    """What a tracker saw of the private memory of a process.

    What the kernel told is put in order when it is first asked for: after the thaw, where nothing
    has to be read before it. That takes as long as what was written is scattered.
    """

    _order: Callable[[], tuple[Spans, Spans]]

    @classmethod
    def of(cls, populated: Spans, clean: Spans) -> Self:
        """Make one of what is in order."""
        return cls(lambda: (populated, clean))

    @cached_property
    def _sets(self) -> tuple[Spans, Spans]:
        return self._order()

    @property
    def populated(self) -> Spans:
        """Pages whose content is the process's own."""
        return self._sets[0]

    @property
    def clean(self) -> Spans:
        """Those of them that nobody has written since the epoch."""
        return self._sets[1]


class Tracker(Protocol):
    """A way to learn which pages were written since the last generation."""

    @property
    def name(self) -> TrackerName:
        """Which one it is."""

    def peek(self, pid: Pid, own: Own) -> Spans:
        """Return what was written in anonymous mappings, without re-arming; out of date at once.

        State:  any. What `collect` will find differs a little even while frozen: an estimate.

        Raises:
            TargetGone: the process ended.
        """

    def watches_all(self, pid: Pid, own: Own) -> bool:
        """Tell whether `watch` has nothing to do: every page is in a mapping that was prepared.

        State:  any; out of date at once while the target runs.

        Raises:
            TargetGone: the process ended.
        """

    def watch(self, pid: Pid, own: Own) -> None:
        """Prepare the private mappings `own` for being asked about; what is written counts so far.

        State:  target frozen, and `own` as it is now.

        Raises:
            TargetGone: the process ended.
        """

    def collect(self, pid: Pid, own: Own, likely: Spans, *, running: bool = False) -> Scan:
        """Return what was written in the private mappings `own` since the last time, and re-arm.

        State:  target frozen, or running if `LIVE`. Pages must be read after this call.
        Shape:  the result: ascending, disjoint, page aligned byte ranges.

        Args:
            pid: the process.
            own: its private mappings.
            likely: pages that existed a moment ago. Only a hint, which makes the answer quicker.
            running: the target is not frozen, so `own` may be out of date. Mappings that were not
                watched before are not watched now, and read as written.

        Raises:
            TargetGone: the process ended.
        """
