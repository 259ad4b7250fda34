"""The promise: it ends, it freezes only within the limit, and what will not converge is said."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.convergence import Rest, Round, Verdict
from ckpt.migrate.policy import (
    THROTTLES,
    Goal,
    HandOver,
    PreCopy,
    Sent,
    decide,
    expected_ms,
    sending_bytes_per_s,
)
from tests.migrate.links import (
    GBIT,
    HAND_OVER,
    MB,
    PAGE,
    bursty,
    constant,
    play,
    real_downtime_ms,
    rest_of,
    working_set,
)

GB = 1000 * MB


def test_a_program_that_only_reads_needs_one_round():
    played = play(constant(0.01 * MB, GB))
    assert played.end.verdict is Verdict.FREEZE
    assert len(played.rounds) == 1
    assert played.end.downtime_ms < 40


@pytest.mark.parametrize("mb_per_s", [1, 10, 40, 80])
def test_constant_writes_below_the_link_converge_far_below_the_limit(mb_per_s):
    played = play(constant(mb_per_s * MB, GB))
    assert played.end.verdict is Verdict.FREEZE
    assert played.end.downtime_ms < 60, "it had only to go on"
    assert played.end.downtime_ms == pytest.approx(real_downtime_ms(played, GBIT), rel=0.1)


@pytest.mark.parametrize("memory", [256 * MB, GB, 4 * GB])
def test_the_downtime_does_not_grow_with_memory(memory):
    assert play(constant(40 * MB, memory), memory=memory).end.downtime_ms < 60


def test_writes_faster_than_the_link_are_given_up_and_why_is_said():
    played = play(constant(200 * MB, GB))
    assert played.end.verdict is Verdict.GIVE_UP
    assert len(played.rounds) == 4
    assert "while 1000.0 MB were sent, it wrote 1000.0 MB; try" in played.end.sentence
    assert played.end.sentence.endswith(" or --throttle")


def test_a_working_set_that_is_too_large_is_given_up_and_how_long_it_would_take_is_said():
    played = play(working_set(100 * MB, 500 * MB))
    assert played.end.verdict is Verdict.GIVE_UP
    assert "while 100.0 MB were sent, it wrote 100.0 MB; try" in played.end.sentence
    needed = float(played.end.sentence.split("--max-downtime ")[1].split()[0])
    again = play(working_set(100 * MB, 500 * MB), goal=Goal(max_downtime_ms=needed))
    assert again.end.verdict is Verdict.FREEZE


def test_a_working_set_that_fits_is_frozen_as_soon_as_it_does_not_shrink():
    played = play(working_set(20 * MB, 500 * MB))
    assert played.end.verdict is Verdict.FREEZE
    assert len(played.rounds) == 2
    assert "it does not shrink any more" in played.end.sentence


def test_throttling_makes_it_fit():
    goal = Goal(throttle=True)
    played = play(constant(200 * MB, GB), goal=goal)
    assert played.end.verdict is Verdict.FREEZE
    levels = list(dict.fromkeys(one.throttle for one in played.decisions[:-1]))
    assert levels == [0.0, *THROTTLES[: len(levels) - 1]], "more, step by step"
    assert "so it is stopped for 20% of the time" in "".join(
        one.sentence for one in played.decisions
    )
    assert played.end.downtime_ms <= goal.max_downtime_ms


def test_a_storm_that_no_throttling_tames_is_given_up():
    played = play(working_set(900 * MB, 100 * GB), goal=Goal(throttle=True, max_rounds=100))
    assert played.end.verdict is Verdict.GIVE_UP
    assert played.rounds[-1].throttle == THROTTLES[-1]
    assert "although it was stopped for 95% of the time" in played.end.sentence
    assert "--throttle" not in played.end.sentence


def test_a_burst_passes():
    """A round that falls into a burst leaves more than it began with; that is waited for."""
    played = play(bursty(2 * MB, 300 * MB, period_s=10, burst_s=1, memory=GB))
    assert played.end.verdict is Verdict.FREEZE
    assert played.end.downtime_ms < 100


def test_what_compresses_well_is_sent_faster():
    plain, packed = (play(constant(150 * MB, GB), ratio=ratio) for ratio in (1.0, 4.0))
    assert plain.end.verdict is Verdict.GIVE_UP
    assert packed.end.verdict is Verdict.FREEZE
    assert "(1000 Mbit/s)" in packed.decisions[0].sentence, "what the link carries, not the memory"


def test_a_link_that_slows_is_judged_by_what_it_is_now():
    played = play(constant(20 * MB, GB), link=lambda s: GBIT if s < 9 else GBIT / 4)
    assert played.end.verdict is Verdict.FREEZE
    assert played.end.downtime_ms <= 300
    slow = [Sent(GB, GB, 8000, rest_of(30 * MB)), Sent(30 * MB, 30 * MB, 960, rest_of(20 * MB))]
    assert sending_bytes_per_s(slow) == pytest.approx(GBIT / 4)
    assert decide(slow, HAND_OVER, Goal()).verdict is Verdict.COPY, "640 ms are more than 300"


def test_small_rounds_do_not_tell_the_speed_of_a_link():
    rounds = [Sent(GB, GB, 8000, rest_of(MB)), Sent(PAGE, PAGE, 1.0, rest_of(PAGE))]
    assert sending_bytes_per_s(rounds) == pytest.approx(GBIT, rel=0.01)
    far = [Sent(64 * PAGE, 64 * PAGE, 102.0, rest_of(PAGE))]
    assert sending_bytes_per_s(far, 100.0) == pytest.approx(64 * PAGE / 0.0102)


def test_a_hand_over_that_takes_too_long_by_itself_is_given_up_at_once():
    slow = attrs.evolve(HAND_OVER, restore_ms=500)
    played = play(constant(MB, GB), hand_over=slow, goal=Goal(throttle=True))
    assert played.end.verdict is Verdict.GIVE_UP
    assert len(played.rounds) == 1
    assert "a hand-over takes 511 ms without any memory" in played.end.sentence


def test_a_destination_that_is_slower_than_the_link_counts():
    fast = expected_ms(rest_of(100 * MB), 1e9, HAND_OVER)
    slow = expected_ms(rest_of(100 * MB), 1e9, attrs.evolve(HAND_OVER, restore_bytes_per_s=1e8))
    assert slow - fast == pytest.approx(900, rel=0.01)


def test_rounds_run_out():
    played = play(constant(110 * MB, GB), goal=Goal(max_rounds=3))
    assert played.end.verdict is Verdict.GIVE_UP
    assert "3 rounds were not enough" in played.end.sentence
    played = play(constant(30 * MB, GB), goal=Goal(max_rounds=3))
    assert played.end.verdict is Verdict.FREEZE
    assert "these were all rounds" in played.end.sentence


def test_a_sentence_says_what_was_sent_and_what_is_expected():
    rounds = [Sent(GB, 250 * MB, 2000, Rest(100, 8 * MB))]
    decision = decide(rounds, HAND_OVER, Goal())
    assert decision.sentence == (
        "round 1: 1000.0 MB sent in 2.00 s (1000 Mbit/s), 8.0 MB written meanwhile (4.0 MB/s);"
        " expected downtime 49 ms; it fits, and another round helps"
    )


# ---- for whatever history ----

rests = st.builds(Rest, st.integers(0, 10**6), st.integers(0, 10**10))
rounds_of_any_kind = st.builds(
    Sent,
    n_bytes=st.integers(0, 10**10),
    wire_bytes=st.integers(0, 10**10),
    ms=st.floats(0, 10**6),
    rest=rests,
    throttle=st.sampled_from([0.0, *THROTTLES]),
)
hand_overs = st.builds(
    HandOver,
    capture_ms=st.floats(0, 1000),
    restore_ms=st.floats(0, 1000),
    restore_bytes_per_s=st.sampled_from([0.0, 1e6, 1e9]),
    round_trip_ms=st.floats(0, 300),
)
goals = st.builds(
    Goal,
    max_downtime_ms=st.floats(0, 10**5),
    max_rounds=st.integers(1, 12),
    throttle=st.booleans(),
)


@given(st.lists(rounds_of_any_kind, min_size=12, max_size=12), hand_overs, goals)
def test_it_ends_in_time_and_never_freezes_over_the_limit(rounds, hand_over, goal):
    for n in range(1, goal.max_rounds + 1):
        decision = decide(rounds[:n], hand_over, goal)
        if decision.verdict is not Verdict.COPY:
            break
    assert decision.verdict is not Verdict.COPY
    fits = decision.downtime_ms <= goal.max_downtime_ms
    assert (decision.verdict is Verdict.FREEZE) == fits


@given(st.lists(rounds_of_any_kind, min_size=1, max_size=12), hand_overs, goals)
def test_nobody_is_slowed_who_need_not_be_and_nobody_is_let_faster_again(rounds, hand_over, goal):
    decision = decide(rounds, hand_over, goal)
    if not goal.throttle and not rounds[-1].throttle:
        assert decision.throttle == 0
    if decision.verdict is Verdict.COPY:
        assert rounds[-1].throttle <= decision.throttle <= THROTTLES[-1]


@given(rests, rests, st.floats(1e3, 1e10), st.floats(1e3, 1e10), hand_overs)
def test_more_to_send_or_a_slower_link_is_never_a_shorter_downtime(one, more, rate, than, known):
    small, large = sorted((one, more), key=lambda rest: rest.n_bytes)
    large = attrs.evolve(large, n_runs=max(one.n_runs, more.n_runs))
    small = attrs.evolve(small, n_runs=min(one.n_runs, more.n_runs))
    slow, fast = sorted((rate, than))
    assert expected_ms(small, slow, known) <= expected_ms(large, slow, known)
    assert expected_ms(small, fast, known) <= expected_ms(small, slow, known)
    assert expected_ms(small, fast, known) >= known.fixed_ms


@given(st.integers(1, 2000), st.integers(1, 2000), st.booleans(), st.floats(10, 2000))
def test_every_steady_program_comes_to_an_end_that_keeps_the_limit(writes, link, throttle, limit):
    goal = Goal(max_downtime_ms=limit, throttle=throttle)
    played = play(constant(writes * MB, GB), link=lambda _s: link * MB, goal=goal)
    if played.end.verdict is Verdict.FREEZE:
        assert real_downtime_ms(played, link * MB) <= limit * 1.1
    else:
        assert "giving up" in played.end.sentence


# ---- as the engine asks ----


def policy(sent, **goal):
    told = []
    made = PreCopy(Goal(**goal), PAGE, lambda: sent[0], lambda: HAND_OVER, told.append)
    return made, told


def test_the_first_round_is_never_left_out():
    made, told = policy([0])
    assert made.decide([rest_of(GB)], [], begin_ms=1) is Verdict.COPY
    assert told == []
    assert made.throttle == 0


def test_rounds_of_the_engine_become_those_of_the_policy():
    sent = [0]
    made, told = policy(sent)
    made.decide([rest_of(GB)], [], begin_ms=1)
    sent[0] = 500 * MB
    first = Round(GB // PAGE, 4000)
    assert made.decide([rest_of(GB), rest_of(50 * MB)], [first], begin_ms=1) is Verdict.COPY
    sent[0] += 25 * MB
    rounds = [first, Round(50 * MB // PAGE, 200)]
    left = [rest_of(GB), rest_of(50 * MB), rest_of(PAGE)]
    assert made.decide(left, rounds, begin_ms=1) is Verdict.FREEZE
    assert [one.wire_bytes for one in made.rounds] == [500 * MB, 25 * MB]
    assert [one.rest for one in made.rounds] == left[1:]
    assert told == made.decisions
    # The tree was looked at again, which took its time.
    assert made.decide([rest_of(200 * MB)], rounds, begin_ms=0) is Verdict.COPY
    assert [one.rest for one in made.rounds] == [left[1], rest_of(200 * MB)]
    assert not made.fits(rest_of(200 * MB))
    assert made.fits(rest_of(MB))


def test_a_throttle_is_noted_with_the_round_that_it_was_for():
    sent, rounds = [0], []
    made, _ = policy(sent, throttle=True)
    left = [rest_of(GB)]
    made.decide(left, rounds, begin_ms=0)
    for _ in range(6):
        sent[0] += GB
        rounds.append(Round(GB // PAGE, 8000))
        left.append(rest_of(GB))
        assert made.decide(left, rounds, begin_ms=0) is Verdict.COPY
    assert [one.throttle for one in made.rounds] == [0, 0, 0, 0, 0.2, 0.2]
    assert made.throttle == 0.4
