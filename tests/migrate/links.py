"""Programs that write and links that carry, as numbers: what a policy decides is played out."""

from collections.abc import Callable

import attrs

from ckpt.engine.convergence import Rest, Verdict
from ckpt.migrate.policy import Decision, Goal, HandOver, Sent, decide

MB = 1_000_000
PAGE = 4096
GBIT = 1e9 / 8
HAND_OVER = HandOver(capture_ms=10, restore_ms=20, restore_bytes_per_s=2e9, round_trip_ms=0.5)

Writes = Callable[[float, float], Rest]
"""What is left by a program from some second on, that runs for some seconds: each page once."""


def rest_of(n_bytes: float, run_pages: int = 4) -> Rest:
    n_pages = int(n_bytes) // PAGE
    return Rest(-(-n_pages // run_pages), n_pages * PAGE)


def constant(bytes_per_s: float, memory: float) -> Writes:
    """Other pages all the time."""
    return lambda _start, lasts: rest_of(min(bytes_per_s * lasts, memory))


def working_set(n_bytes: float, bytes_per_s: float) -> Writes:
    """The same pages again and again."""
    return lambda _start, lasts: rest_of(min(bytes_per_s * lasts, n_bytes))


def bursty(quiet: float, burst: float, period_s: float, burst_s: float, memory: float) -> Writes:
    """Much for a moment, at the begin of each period, little for the rest of it."""

    def written(until_s: float) -> float:
        n_periods, into_s = divmod(until_s, period_s)
        of_one = burst * burst_s + quiet * (period_s - burst_s)
        part = burst * min(into_s, burst_s) + quiet * max(into_s - burst_s, 0)
        return n_periods * of_one + part

    return lambda start, lasts: rest_of(min(written(start + lasts) - written(start), memory))


@attrs.frozen
class Played:
    """How a migration went."""

    decisions: list[Decision]
    rounds: list[Sent]
    took_s: float

    @property
    def end(self) -> Decision:
        return self.decisions[-1]


def play(
    writes: Writes,
    *,
    memory: float = 1000 * MB,
    link: Callable[[float], float] = lambda _s: GBIT,
    ratio: float = 1.0,
    goal: Goal | None = None,
    hand_over: HandOver = HAND_OVER,
) -> Played:
    """Send round after round as the policy says, to its end.

    Args:
        writes: what the program does.
        memory: bytes of the first round.
        link: bytes per second at some second.
        ratio: bytes of memory for each byte on the wire.
        goal: of the policy.
        hand_over: of the policy.
    """
    goal = goal or Goal()
    at_s, left, throttle = 0.0, rest_of(memory), 0.0
    played = Played([], [], 0.0)
    while True:
        assert len(played.rounds) < goal.max_rounds, "more rounds than were allowed"
        lasts_s = left.n_bytes / ratio / link(at_s) + hand_over.round_trip_ms / 1000
        rest = writes(at_s, lasts_s * (1 - throttle))
        at_s += lasts_s
        wire = int(left.n_bytes / ratio)
        played.rounds.append(Sent(left.n_bytes, wire, lasts_s * 1000, rest, throttle))
        played.decisions.append(decide(played.rounds, hand_over, goal))
        if played.end.verdict is not Verdict.COPY:
            return attrs.evolve(played, took_s=at_s)
        left, throttle = rest, played.end.throttle


def real_downtime_ms(played: Played, rate: float, hand_over: HandOver = HAND_OVER) -> float:
    """Return what a freeze at the end takes on a link of this rate (of memory)."""
    rest = played.rounds[-1].rest
    return hand_over.fixed_ms + rest.n_bytes / rate * 1000
