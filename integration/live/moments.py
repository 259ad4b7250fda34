"""Something happens to a target at one moment of a dump: no race, so each run is the same.

with at(Moment.COPYING, 2, lambda: work.ask("step")):
    dump(work.pid, image)       in the second round, between the scan and the reading
"""

import contextlib
import enum
from collections.abc import Callable, Iterator

from ckpt.engine.copying import Copy
from ckpt.engine.live import Rounds
from ckpt.engine.taking import Taking
from ckpt.engine.tracking import Tracking
from ckpt.image.writer import GenerationWriter
from ckpt.process import twin as twins


class Moment(enum.Enum):
    """The call of ckpt before which it happens."""

    WATCHING = (Rounds, "_watch")
    """Before the stop that precedes all rounds."""
    ROUND = (Rounds, "_ask")
    """Before a round: nothing is armed for it yet."""
    COLLECTING = (Tracking, "collect")
    """In a round, and in the freeze: the tracker is to be asked about mappings that were read."""
    COPYING = (Copy, "read_running")
    """In a round: pages have been found and are about to be read."""
    FREEZING = (Taking, "take")
    """After the rounds."""
    SEIZING = (twins, "_seize")
    """A twin sleeps, and is not ours yet; the target stands still."""
    STORING = (Copy, "store_all")
    """Before what was read is stored; also in rounds. The last two: the target runs again."""
    COMMITTING = (GenerationWriter, "commit")
    """All has been copied, the target runs again."""


@contextlib.contextmanager
def at(moment: Moment, turn: int, act: Callable[[], object]) -> Iterator[list[int]]:
    """Do `act` before the `turn`-th (from 1) such call; lends a list with the number of calls."""
    owner, name = moment.value
    original = getattr(owner, name)
    calls = [0]

    def wrapped(*args, **more):
        calls[0] += 1
        if calls[0] == turn:
            act()
        return original(*args, **more)

    setattr(owner, name, wrapped)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def twins_counted() -> Iterator[list[int]]:
    """Lend a list with the number of twins that were seized."""
    with at(Moment.SEIZING, 0, lambda: None) as calls:
        yield calls
