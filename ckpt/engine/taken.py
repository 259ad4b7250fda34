"""What was taken of a tree that stands still and is to be killed: it ends, or goes on after all.

Neighbours: `taking` makes it; a dump ends it when the image is whole, a migration when the tree
runs elsewhere.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping

import attrs

from ckpt.engine.records import TreeImage
from ckpt.errors import TargetGone
from ckpt.image.runs import RunTable
from ckpt.kernel import ptrace
from ckpt.process.freezer import FrozenTree, forget
from ckpt.resources.base import Tree, run_all
from ckpt.tracker.spans import Spans
from ckpt.units import Pid


@attrs.frozen(repr=False)
class Taken:
    """What was taken of a tree."""

    frozen: FrozenTree
    tree: Tree
    """Of the capture."""
    image: TreeImage
    held: Mapping[str, Spans]
    """The pages of each page space that have content in the stream, or in the parent generation."""
    spaces: Callable[[], Mapping[str, RunTable]]
    """Tells where each of them is; that is the more work the more often memory was written."""
    left: tuple[tuple[str, Pid, Spans], ...] = ()
    """Page space, process, and its pages that were not copied (see `Taking.leave`)."""

    @property
    def standing_ms(self) -> float:
        """For how long the tree has stood still by now, if it still does."""
        return (time.monotonic() - self.frozen.frozen_at_s) * 1000

    def doom(self) -> None:
        """Have the target end with us from here on, however we end; it never runs again.

        State: it was taken to be killed, and stands still.

        Raises:
            CkptError, OSError: something of it could not be readied for its end; nothing changed.
        """
        # First: who outlives us has no silenced connections.
        self._set_options(ptrace.Option.EXITKILL)
        try:
            run_all(self.tree.at_kill)
        except BaseException:
            self._set_options(ptrace.Option.NONE)
            raise

    def spare(self) -> None:
        """Take `doom` back: the target goes on at the end of the block."""
        self._set_options(ptrace.Option.NONE)
        run_all(self.tree.at_spared)

    def _set_options(self, more: ptrace.Option) -> None:
        for frozen in self.frozen.processes.values():
            for task in frozen.tasks.values():
                # One that somebody has killed meanwhile must not keep the others from it.
                with contextlib.suppress(TargetGone):
                    ptrace.set_options(task.tid, self.frozen.options | more)

    def kill(self) -> None:
        """End the target where it stands; it does not run another instruction.

        State: `doom` was called; it stands still.
        """
        # The deepest first: no parent is told of the end of a child.
        for frozen in reversed(self.frozen.processes.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(frozen.pid, signal.SIGKILL)
        for frozen in reversed(self.frozen.processes.values()):
            forget(frozen)
