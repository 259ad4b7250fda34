"""Making room for the next checkpoint of a command under protection.

with the private key        0 <- 1 <- 2 <- 3     of the oldest that is kept a full one is made,
or not encrypted                 [1] <- 2 <- 3   what was before it goes

without                     0 <- 1   2 <- 3      nothing can be merged: every N-th is full, and the
                                     2 <- 3      older ones go when no kept one is based on them:
                                                 N are kept, and up to N - 1 more

Neighbours: `attempt` does this in its child, `image.prune` has the rules.
"""

from pathlib import Path

import attrs

from ckpt.engine.dump import DumpOptions
from ckpt.errors import CkptError
from ckpt.image.access import Access
from ckpt.image.chain import Chain
from ckpt.image.prune import Retention, prune

FULL_AGAIN = "older ones are encrypted, and cannot be merged without --identity"
"""Why a checkpoint is full that could have been a delta."""


@attrs.frozen
class Keeping:
    """How many generations are kept, and how."""

    keep_last: int
    access: Access
    """How the chain is read."""
    merges: bool
    """What is kept can be opened, so that what it needs of others can be merged into it."""

    def begins_anew(self, directory: Path) -> bool:
        """Tell whether the next generation should be full, so that what is there can go once."""
        if self.merges:
            return False
        try:
            chain = Chain.open(directory, self.access)
            newest = chain.newest()
            return newest is not None and len(chain.lineage(newest)) >= self.keep_last
        except CkptError:
            # Whoever dumps says it better; at worst the lineage gets longer.
            return False

    def adapt(self, directory: Path, options: DumpOptions) -> tuple[DumpOptions, str]:
        """Return how the next one is dumped, and why it is full if that is our doing."""
        if not self.begins_anew(directory):
            return options, ""
        return attrs.evolve(options, incremental=False), FULL_AGAIN

    def make_room(self, directory: Path) -> tuple[int, ...]:
        """Remove older generations; return which, ascending.

        Raises:
            CkptError: it cannot be done; that harms neither these nor the new one.
        """
        chain = Chain.open(directory, self.access)
        result = prune(chain, Retention(self.keep_last), merges=self.merges)
        return tuple(sorted(result.plan.removed))
