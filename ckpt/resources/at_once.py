"""What our own calls tell of each thread: asked of all of them at once, in a burst.

`look` lays out the calls and keeps the result in `Target.notes`; of a frozen process, the first
capture that wants an answer runs them all. A thread that is newer than the look is left out, and is
asked alone. Nothing is read before the freeze.
"""

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from ckpt.process.freezer import Frozen
from ckpt.resources.base import Stopped
from ckpt.units import Tid

A = TypeVar("A")


class AskedAtOnce(Generic[A]):
    """Answers by thread, as they are in the freeze in which they are first wanted."""

    def __init__(self, ask: Callable[[], Mapping[Tid, A]]) -> None:
        """Take what asks; threads that it was not made for, or that are gone, have no answer."""
        self._ask = ask
        self._asked_in: Frozen | None = None
        self._answers: Mapping[Tid, A] = {}

    def of(self, stopped: Stopped) -> A | None:
        """Return the answer of a thread of a frozen process; None: ask it alone."""
        if self._asked_in is not stopped.frozen:
            self._answers = self._ask()
            self._asked_in = stopped.frozen
        return self._answers.get(stopped.tid)
