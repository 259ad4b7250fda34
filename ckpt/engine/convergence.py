"""When to stop copying a running target and freeze it; pure.

Each round copies what was written during the one before. What is left shrinks as long as pages are
copied faster than the target writes new ones:

    round    1              2      3    freeze
    left     ############## #####  ##   #

One more round costs the target little (a fault for each page that it writes again), so rounds go on
until what is left is copied in no time, or does not shrink any more.
"""

import enum
import itertools
from collections.abc import Sequence
from typing import Final, Protocol

import attrs

DEFAULT_BUDGET_MS = 10.0
"""How long the last copy may take while the target stands, unless the user says otherwise."""

_RUN_MS = 0.004
"""What a run of pages costs while frozen, whatever its length: to be scanned, sorted, named."""
_BYTES_PER_MS = 4_000_000
"""process_vm_readv into memory that was touched before, on a machine of two cores."""
_SMALL_MS = 1.0
SHRINKING: Final = 0.7
"""What a round must leave, at most, of what it began with, to be worth another."""
_MAX_ROUNDS = 12


@attrs.frozen
class Round:
    """One round of copying while the target ran."""

    n_pages: int
    ms: float


@attrs.frozen(slots=True, repr=False)
class Rest:
    """What would have to be copied if the target were frozen now."""

    n_runs: int
    n_bytes: int

    @property
    def copy_ms(self) -> float:
        """How long that would take, roughly."""
        return self.n_runs * _RUN_MS + self.n_bytes / _BYTES_PER_MS


class Verdict(enum.Enum):
    """What to do next."""

    COPY = "another round"
    FREEZE = "freeze, and copy the rest"
    GIVE_UP = "the rest is too much for the budget, and does not shrink"


def decide(rests: Sequence[Rest], *, budget_ms: float, begin_ms: float) -> Verdict:
    """Return what to do, given what was left at the begin of each round, and now (the last).

    Args:
        rests: at least one.
        budget_ms: how long the last copy may take.
        begin_ms: what the first round costs the target beyond copying (a stop of its own).
    """
    now = rests[-1]
    fits = now.copy_ms <= budget_ms
    small_ms = _SMALL_MS if len(rests) > 1 else max(_SMALL_MS, begin_ms)
    if now.copy_ms <= min(small_ms, budget_ms):
        return Verdict.FREEZE
    if len(rests) > _MAX_ROUNDS or _has_stalled(rests, patience=1 if fits else 2):
        return Verdict.FREEZE if fits else Verdict.GIVE_UP
    return Verdict.COPY


def _has_stalled(rests: Sequence[Rest], patience: int) -> bool:
    """Tell whether each of the last `patience` rounds left nearly what it began with."""
    if len(rests) <= patience:
        return False
    last = rests[-patience - 1 :]
    return all(
        after.copy_ms > before.copy_ms * SHRINKING for before, after in itertools.pairwise(last)
    )


class Policy(Protocol):
    """Says when rounds end: a dump by how long copying stops the target, a migration by more."""

    def decide(self, rests: Sequence[Rest], rounds: Sequence[Round], *, begin_ms: float) -> Verdict:
        """Return what to do, given what was left at the begin of each round, and now (the last).

        Args:
            rests: one more than rounds, or as many as since the target was looked at again.
            rounds: all so far.
            begin_ms: what the first round costs the target beyond copying (a stop of its own).
        """

    def fits(self, rest: Rest) -> bool:
        """Tell whether so much may be copied while the target stands."""

    @property
    def throttle(self) -> float:
        """For how much of the time the target is to be stopped in the round that comes."""


@attrs.frozen
class Budget:
    """The policy of a dump: copying the rest may stop the target for so long."""

    ms: float

    def decide(
        self, rests: Sequence[Rest], _rounds: Sequence[Round], *, begin_ms: float
    ) -> Verdict:
        """See `decide`."""
        return decide(rests, budget_ms=self.ms, begin_ms=begin_ms)

    def fits(self, rest: Rest) -> bool:
        """See `Policy`."""
        return rest.copy_ms <= self.ms

    @property
    def throttle(self) -> float:
        """See `Policy`: nobody is slowed for a dump."""
        return 0.0
