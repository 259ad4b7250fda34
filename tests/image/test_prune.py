"""What retention keeps, by rules that are tried on any chain; and that what is kept stays whole."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.errors import ImageBusy, ImageCorrupt, UsageError
from ckpt.image.chain import Chain
from ckpt.image.prune import PrunePlan, Retention, Taken, choose_kept, plan_prune, prune
from ckpt.image.squash import ancestors_of
from tests.image.chain_model import add_generation, new_chain, parent
from tests.image.histories import histories
from tests.image.test_squash import HISTORY, assert_replays, make

HOUR_S = 3600.0
TIMES = st.floats(0, 1e6) | st.integers(0, 20).map(lambda n: n * HOUR_S)
RETENTIONS = st.builds(
    Retention,
    keep_last=st.none() | st.integers(1, 6),
    keep_every_s=st.sampled_from([None, 1.0, 60.0, HOUR_S, 1e5]),
).filter(lambda retention: retention != Retention())


@st.composite
def chains(draw):
    """Generations with gaps in their numbers, any times (clocks are set back), in order."""
    numbers = sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=20)))
    return [Taken(number, draw(TIMES)) for number in numbers]


@given(chain=chains(), retention=RETENTIONS)
def test_the_newest_are_kept_and_one_of_each_period(chain, retention):
    kept = choose_kept(chain, retention)
    numbers = [taken.number for taken in chain]
    assert kept <= set(numbers)
    assert numbers[-1] in kept
    if retention.keep_last is not None:
        assert set(numbers[-retention.keep_last :]) <= kept
    every_s = retention.keep_every_s
    if every_s is not None:
        periods = {taken.created_s // every_s for taken in chain}
        assert periods == {taken.created_s // every_s for taken in chain if taken.number in kept}
    assert len(kept) <= (retention.keep_last or 1) + (0 if every_s is None else len(periods))


@given(chain=chains(), retention=RETENTIONS)
def test_pruning_again_finds_nothing_more(chain, retention):
    kept = choose_kept(chain, retention)
    rest = [taken for taken in chain if taken.number in kept]
    assert choose_kept(rest, retention) == kept


@given(chain=chains(), every_s=st.sampled_from([60.0, HOUR_S]), last=st.integers(1, 4))
def test_pruning_after_each_dump_keeps_what_pruning_once_at_the_end_does(chain, every_s, last):
    """What is thrown away early is never what a later run would have wanted."""
    times = sorted(taken.created_s for taken in chain)
    chain = [Taken(one.number, time) for one, time in zip(chain, times, strict=True)]
    retention = Retention(last, every_s)
    left = []
    for taken in chain:
        left.append(taken)
        kept = choose_kept(left, retention)
        left = [one for one in left if one.number in kept]
    assert {taken.number for taken in left} == choose_kept(chain, retention)


@given(data=st.data(), n=st.integers(1, 20))
def test_a_plan_leaves_whole_what_is_kept(data, n):
    parents = {0: None}
    for number in range(1, n):
        parents[number] = data.draw(st.none() | st.integers(0, number - 1))
    kept = data.draw(st.sets(st.sampled_from(range(n)), min_size=1))
    plan = plan_prune(parents, kept)
    after = {number: parents[number] for number in plan.kept} | dict(plan.folds)
    assert set(plan.kept) | set(plan.removed) == set(parents)
    assert set(plan.kept) == kept == set(after)
    assert list(plan.removed) == sorted(plan.removed, reverse=True)
    for number, above in after.items():
        # Its new parent is the nearest of its old ancestors that is kept.
        old = [one for one in ancestors_of(parents, number) if one in kept]
        assert above == (old[0] if old else None)
    assert all(after[number] != parents[number] for number, _ in plan.folds)


def test_an_hour_and_three():
    chain = [Taken(number, number * 600.0) for number in range(20)]
    assert sorted(choose_kept(chain, Retention(3, HOUR_S))) == [5, 11, 17, 18, 19]


@pytest.mark.parametrize(
    ("retention", "text"),
    [
        (Retention(), "say what to keep"),
        (Retention(keep_last=0), "at least 1"),
        (Retention(keep_every_s=0.0), "above zero"),
        (Retention(keep_every_s=float("nan")), "above zero"),
    ],
)
def test_rules_that_make_no_sense(retention, text):
    with pytest.raises(UsageError, match=text):
        choose_kept([], retention)


@settings(max_examples=40)
@given(history=histories(), retention=RETENTIONS, data=st.data())
def test_any_chain_that_is_pruned_reads_as_before(history, retention, data):
    with tempfile.TemporaryDirectory() as directory:
        chain = new_chain(Path(directory) / "chain")
        for above, spaces in history:
            add_generation(chain, spaces, above, created_s=data.draw(TIMES))
        plan = prune(chain, retention, dry_run=True).plan
        assert_replays(chain.path, history, range(len(history)))
        assert prune(chain, retention).plan == plan
        assert_replays(chain.path, history, plan.kept)
        again = prune(chain, retention)
        assert (again.plan.removed, again.plan.folds) == ((), ())
        assert again.stored_before_bytes == again.stored_after_bytes
        assert {entry.name for entry in chain.path.iterdir()} == {
            "CKPT",
            "lock",
            "newest",
            *(f"gen-{number:06d}" for number in plan.kept),
        }


def test_a_chain_that_is_pruned_after_each_dump_stays_small_and_goes_on(tmp_path):
    chain = make(tmp_path / "chain")
    history = list(HISTORY)
    for number in range(4, 24):
        history.append((number - 1, {"mm": [parent(0, 11)]}))
        add_generation(chain, history[number][1], number - 1)
        result = prune(chain, Retention(keep_last=3))
        assert chain.generations() == [number - 2, number - 1, number]
        assert result.stored_after_bytes < 40_000
        # The oldest one takes in the one that goes, and the others stay deltas.
        full = [chain.manifest(n).parent is None for n in chain.generations()]
        assert full == [True, False, False]
    assert_replays(chain.path, history, [21, 22, 23])


def test_nothing_is_removed_where_something_cannot_be_read(tmp_path):
    chain = make(tmp_path / "chain")
    manifest = chain.path / "gen-000001" / "manifest"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    before = sorted(chain.path.rglob("*"))
    with pytest.raises(ImageCorrupt):
        prune(chain, Retention(keep_last=1))
    assert sorted(chain.path.rglob("*")) == before


def test_a_chain_that_is_being_read_is_not_pruned(tmp_path):
    chain = make(tmp_path / "chain")
    with Chain.open(chain.path).in_use(), pytest.raises(ImageBusy):
        prune(chain, Retention(keep_last=1))
    assert_replays(chain.path, HISTORY, range(4))
    assert prune(chain, Retention(keep_last=1)).plan.kept == (3,)


def test_an_empty_chain_has_nothing_to_prune(tmp_path):
    chain = new_chain(tmp_path / "empty")
    assert prune(chain, Retention(keep_last=1)).plan == PrunePlan((), (), ())
