"""What the policy makes of programs as they really write.

`traces/` holds what integration/migrate/traces.py has recorded of them.
"""

import json
from pathlib import Path

import pytest

from ckpt.engine.convergence import Rest, Verdict
from ckpt.migrate.policy import Goal
from tests.migrate.links import GBIT, PAGE, Played, play, real_downtime_ms

TRACES = Path(__file__).parent / "traces"
NAMES = sorted(path.stem for path in TRACES.glob("*.json"))


class Recorded:
    """A program as it was recorded: rounds of some lengths, and what each left.

    A round of another length leaves what lies between its neighbours; of several of one length each
    has its turn.
    """

    def __init__(self, name):
        held = json.loads((TRACES / f"{name}.json").read_text())
        assert held["page_size"] == PAGE
        self.resident = held["resident_pages"]
        self.rounds = held["rounds"]
        self.n_calls = 0

    @property
    def memory(self):
        return self.resident * PAGE

    def __call__(self, _start_s, lasts_s):
        self.n_calls += 1
        known = [(0.0, 0, 0)] + [self.sample(at) for at in range(len(self.rounds) // 4)]
        ms = lasts_s * 1000
        after = next((at for at, one in enumerate(known) if one[0] >= ms), len(known) - 1)
        low, high = known[after - 1], known[after]
        if ms > high[0]:
            low = (0.0, 0, 0)
        share = (ms - low[0]) / (high[0] - low[0])
        pages, runs = (low[n] + share * (high[n] - low[n]) for n in (1, 2))
        pages = min(int(pages), self.resident)
        return Rest(min(int(runs), pages), pages * PAGE)

    def sample(self, at):
        one = self.rounds[at * 4 + self.n_calls % 4]
        return one["ms"], one["pages"], one["runs"]


def play_recorded(name, gbit_per_s, **goal) -> Played:
    recorded = Recorded(name)
    return play(
        recorded, memory=recorded.memory, link=lambda _s: gbit_per_s * GBIT, goal=Goal(**goal)
    )


def test_there_are_traces():
    assert len(NAMES) == 6


@pytest.mark.parametrize("name", NAMES)
def test_over_a_wide_link_every_program_moves_within_the_limit(name):
    played = play_recorded(name, 10)
    assert played.end.verdict is Verdict.FREEZE
    assert played.end.downtime_ms <= 80
    assert played.end.downtime_ms == pytest.approx(real_downtime_ms(played, 10 * GBIT), rel=1)


@pytest.mark.parametrize(
    ("name", "limit_ms"),
    [("redis-idle", 40), ("redis-counters", 40), ("writer-1000", 200), ("redis-sets", 100)],
)
def test_over_a_narrow_link_those_that_write_little_do(name, limit_ms):
    played = play_recorded(name, 1)
    assert played.end.verdict is Verdict.FREEZE
    assert played.end.downtime_ms <= limit_ms


@pytest.mark.parametrize("name", NAMES)
def test_over_a_narrow_link_it_ends_and_is_slowed_only_if_it_must(name):
    plain, slowed = play_recorded(name, 0.1), play_recorded(name, 0.1, throttle=True)
    for played in (plain, slowed):
        fits = played.end.downtime_ms <= Goal().max_downtime_ms
        assert (played.end.verdict is Verdict.FREEZE) == fits
    if plain.end.verdict is Verdict.FREEZE:
        assert not any(one.throttle for one in slowed.rounds)
