"""When to stop sending a running tree and freeze it; pure.

Each round sends what was written during the one before. If the tree were frozen now, it would stand
still until what is left has been sent and put in place:

    downtime   capture here + send the rest, or put it in place there, whichever takes longer
               + restore there + messages of the hand-over

The words are those of `engine/convergence`, which ends the rounds of a dump: `Rest`, `Verdict`. The
difference is the price of a byte: there the speed of memory, which is known, here that of a link,
which is measured, and may change.

- **It fits** if the downtime is at most the goal's. Then rounds end as soon as one more would not
  help: little is left, or it does not shrink. So the goal is a limit, not what is aimed at.
- **It does not converge** if rounds do not shrink what is left, though it does not fit: the tree
  writes faster than the link carries, or writes the same pages again and again, too many of them.
  With `throttle` it is then stopped for a part of the time, shortly and often, for more of it each
  time that this does not help enough, up to 95 %.
- **Then it gives up**, and so it does if rounds run out. The tree goes on where it is: nobody is
  hurt by a move that has not begun, while a stop that is longer than was allowed may end every
  connection. Who wants it anyway allows a longer one; the sentence says how long it would be.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from ckpt.engine.convergence import SHRINKING, Rest, Round, Verdict

DEFAULT_MAX_DOWNTIME_MS: Final = 300.0
"""What a person does not take for an outage, and TCP answers by sending once more."""
DEFAULT_MAX_ROUNDS: Final = 30

_MESSAGES = 2
"""Round trips of a hand-over: state and answer, doom and answer (`migrate/handover`)."""
_ENOUGH_BYTES = 16 << 20
"""What must have been sent for the time that it took to tell the speed of the link."""
_UNKNOWN_BYTES_PER_S = 100e6
"""Of a link that has carried nothing yet: 1 Gbit/s, less its headers."""
_LITTLE_MS = 2.0
_LITTLE_SHARE = 0.05
"""Of all else that the downtime has: sending the rest in so little time is not worth a round."""
_PATIENCE = 3
"""Rounds without a new best until rounds are said not to help: a burst may pass."""
_PATIENCE_THROTTLED = 2
THROTTLES: Final = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""For how much of the time the tree is stopped, one after the other."""


@attrs.frozen(slots=True)
class Goal:
    """What the user of a migration may choose."""

    max_downtime_ms: float = DEFAULT_MAX_DOWNTIME_MS
    max_rounds: int = DEFAULT_MAX_ROUNDS
    throttle: bool = False
    """The tree may be slowed if it writes too fast."""


@attrs.frozen(slots=True)
class HandOver:
    """What a hand-over takes besides sending memory, as far as it was measured."""

    capture_ms: float = 0.0
    """To stop the tree and take all but its memory."""
    restore_ms: float = 0.0
    """From the last page to the first instruction, as the destination reports it."""
    restore_bytes_per_s: float = 0.0
    """How fast it puts pages in place; 0 while that is unknown."""
    round_trip_ms: float = 0.0

    @property
    def fixed_ms(self) -> float:
        """What remains if there is no memory to send."""
        return self.capture_ms + self.restore_ms + _MESSAGES * self.round_trip_ms


@attrs.frozen(slots=True)
class Sent:
    """One round, and what was left when it was over."""

    n_bytes: int
    """Of memory."""
    wire_bytes: int
    """The same, compressed."""
    ms: float
    rest: Rest
    """What was written meanwhile: each page once."""
    throttle: float = 0.0
    """For how much of the time the tree was stopped."""

    @property
    def written_bytes_per_s(self) -> float:
        """How fast other pages were written."""
        return self.rest.n_bytes / max(self.ms, 0.001) * 1000


@attrs.frozen(slots=True)
class Decision:
    """What to do, and why."""

    verdict: Verdict
    downtime_ms: float
    """That is expected if the tree is frozen now."""
    throttle: float
    """For how much of the time the tree is to be stopped in the next round."""
    sentence: str
    """Of the round, for a user."""


def expected_ms(rest: Rest, bytes_per_s: float, hand_over: HandOver) -> float:
    """Return for how long the tree would stand still for so much memory.

    Args:
        rest: what is left.
        bytes_per_s: of memory, how fast it is sent.
        hand_over: what it takes besides.
    """
    return hand_over.fixed_ms + _memory_ms(rest, bytes_per_s, hand_over)


def _memory_ms(rest: Rest, bytes_per_s: float, hand_over: HandOver) -> float:
    slowest = min(bytes_per_s, hand_over.restore_bytes_per_s or bytes_per_s)
    return rest.copy_ms + rest.n_bytes / slowest * 1000


def sending_bytes_per_s(rounds: Sequence[Sent], round_trip_ms: float = 0.0) -> float:
    """Return how fast memory is sent now: by the last rounds that sent enough to tell.

    Small rounds say little (most of their time is a round trip), old ones nothing of a link that
    has become slow, nor of pages that compress otherwise.
    """
    n_bytes, ms = 0, 0.0
    for one in reversed(rounds):
        n_bytes += one.n_bytes
        ms += max(one.ms - round_trip_ms, one.ms / 10)
        if n_bytes >= _ENOUGH_BYTES:
            break
    return n_bytes / ms * 1000 if n_bytes and ms > 0 else _UNKNOWN_BYTES_PER_S


def decide(rounds: Sequence[Sent], hand_over: HandOver, goal: Goal) -> Decision:
    """Return what to do after some rounds, at least one.

    It depends on nothing but its arguments: on the same history it decides the same.
    """
    rate = sending_bytes_per_s(rounds, hand_over.round_trip_ms)
    # All by what is known now: rounds are compared by what they left, not by how fast that was.
    lefts_ms = [_memory_ms(one.rest, rate, hand_over) for one in rounds]
    now_ms = hand_over.fixed_ms + lefts_ms[-1]
    possible_ms = hand_over.fixed_ms + min(lefts_ms)
    said = _describe(rounds, now_ms)

    def say(verdict: Verdict, why: str, throttle: float = 0.0) -> Decision:
        return Decision(verdict, now_ms, throttle, f"{said}; {why}")

    throttle = rounds[-1].throttle
    if now_ms <= goal.max_downtime_ms:
        why = _why_not_another(lefts_ms, hand_over, goal)
        if why:
            return say(Verdict.FREEZE, f"freezing: {why}")
        return say(Verdict.COPY, "it fits, and another round helps", throttle)
    if hand_over.fixed_ms > goal.max_downtime_ms:
        why = f"a hand-over takes {hand_over.fixed_ms:.0f} ms without any memory"
        return say(Verdict.GIVE_UP, _advise(why, goal, hand_over.fixed_ms, throttle))
    if len(rounds) >= goal.max_rounds:
        why = f"{goal.max_rounds} rounds were not enough"
        return say(Verdict.GIVE_UP, _advise(why, goal, possible_ms, throttle))
    if not _has_stalled(rounds, lefts_ms):
        return say(Verdict.COPY, "another round", throttle)
    why = _why_stalled(rounds)
    if goal.throttle and throttle < THROTTLES[-1]:
        more = next(one for one in THROTTLES if one > throttle)
        why = f"{why}, so it is stopped for {more:.0%} of the time"
        return say(Verdict.COPY, why, more)
    return say(Verdict.GIVE_UP, _advise(why, goal, possible_ms, throttle))


def _why_not_another(lefts_ms: Sequence[float], hand_over: HandOver, goal: Goal) -> str:
    """Return why there is no point in another round; "" if there is one."""
    if lefts_ms[-1] <= max(_LITTLE_MS, hand_over.fixed_ms * _LITTLE_SHARE):
        return "little is left"
    if len(lefts_ms) >= goal.max_rounds:
        return "these were all rounds"
    if len(lefts_ms) > 1 and lefts_ms[-1] > lefts_ms[-2] * SHRINKING:
        return "it does not shrink any more"
    return ""


def _has_stalled(rounds: Sequence[Sent], lefts_ms: Sequence[float]) -> bool:
    """Tell whether some rounds have not brought down what is left, to far below what it was.

    A tree that has just been slowed has as many again.
    """
    reached_ms, since, before = lefts_ms[0], 0, rounds[0].throttle
    for one, ms in itertools.islice(zip(rounds, lefts_ms, strict=True), 1, None):
        since += 1
        if ms <= reached_ms * SHRINKING:
            reached_ms, since = ms, 0
        elif one.throttle != before:
            since = 1
        before = one.throttle
    return since >= (_PATIENCE_THROTTLED if before else _PATIENCE)


def _why_stalled(rounds: Sequence[Sent]) -> str:
    """Say the same of a tree that is faster than the link, and of one that writes in circles.

    Rounds cannot tell them apart: both leave again as much as was sent.
    """
    last = rounds[-1]
    return f"while {last.n_bytes / 1e6:.1f} MB were sent, it wrote {last.rest.n_bytes / 1e6:.1f} MB"


def _advise(why: str, goal: Goal, possible_ms: float, throttle: float) -> str:
    """Return why it gives up, and what would help."""
    help_by = [f"--max-downtime {possible_ms * 1.2:.0f}"]
    if not goal.throttle:
        help_by.append("--throttle")
    slowed = f", although it was stopped for {throttle:.0%} of the time" if throttle else ""
    return f"giving up: {why}{slowed}; try {' or '.join(help_by)}"


def _describe(rounds: Sequence[Sent], downtime_ms: float) -> str:
    last = rounds[-1]
    wire_bits_per_s = last.wire_bytes * 8 / max(last.ms, 0.001) * 1000
    return (
        f"round {len(rounds)}: {last.n_bytes / 1e6:.1f} MB sent in {last.ms / 1000:.2f} s"
        f" ({wire_bits_per_s / 1e6:.0f} Mbit/s), {last.rest.n_bytes / 1e6:.1f} MB written meanwhile"
        f" ({last.written_bytes_per_s / 1e6:.1f} MB/s); expected downtime {downtime_ms:.0f} ms"
    )


def tell_nobody(_decision: Decision) -> None:
    """Stand for a caller that wants no progress."""


@attrs.define(repr=False)
class PreCopy:
    """The policy of a migration, for `engine.live.Rounds` (`convergence.Policy`).

    After `GIVE_UP` the last of `decisions` says why, and nobody must freeze the tree.
    """

    goal: Goal
    page_size: int
    sent_bytes: Callable[[], int]
    """How much has been put on the wire by now, in all."""
    hand_over: Callable[[], HandOver]
    """What is known of that by now."""
    tell: Callable[[Decision], None] = tell_nobody
    rounds: list[Sent] = attrs.Factory(list)
    decisions: list[Decision] = attrs.Factory(list)
    _n_seen: int = 0
    _n_sent_bytes: int = 0

    @property
    def throttle(self) -> float:
        """For how much of the time the tree is to be stopped in the round that comes."""
        return self.decisions[-1].throttle if self.decisions else 0.0

    def decide(self, rests: Sequence[Rest], rounds: Sequence[Round], *, begin_ms: float) -> Verdict:
        """See `convergence.Policy`; the first round is never left out: nothing is known before."""
        del begin_ms  # nothing against what a round takes over a link
        if not rounds:
            return Verdict.COPY
        self._note(rests[-1], rounds[self._n_seen :])
        decision = decide(self.rounds, self.hand_over(), self.goal)
        self.decisions.append(decision)
        self.tell(decision)
        return decision.verdict

    def _note(self, rest: Rest, new: Sequence[Round]) -> None:
        """Take what was sent since; if nothing was, what is left now is what the round has left."""
        self._n_seen += len(new)
        if not new:
            self.rounds[-1] = attrs.evolve(self.rounds[-1], rest=rest)
            return
        before, self._n_sent_bytes = self._n_sent_bytes, self.sent_bytes()
        self.rounds.append(
            Sent(
                n_bytes=sum(one.n_pages for one in new) * self.page_size,
                wire_bytes=self._n_sent_bytes - before,
                ms=sum(one.ms for one in new),
                rest=rest,
                throttle=self.throttle,
            )
        )

    def fits(self, rest: Rest) -> bool:
        """See `convergence.Policy`."""
        hand_over = self.hand_over()
        rate = sending_bytes_per_s(self.rounds, hand_over.round_trip_ms)
        return expected_ms(rest, rate, hand_over) <= self.goal.max_downtime_ms
