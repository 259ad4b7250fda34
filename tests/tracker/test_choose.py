"""The promise: a delta is made only where it is right, and a user is told why it is not."""

import re

import attrs
import pytest

from ckpt.errors import FeatureMissing
from ckpt.kernel.features import Features
from ckpt.process.tree import Identity
from ckpt.tracker.base import TrackerName
from ckpt.tracker.choose import Plan, choose_tracker, plan_generation
from ckpt.tracker.epoch import Epoch
from ckpt.units import GenerationNo, Pid


def features(**those):
    """Return the features of a kernel that has nothing but those."""
    kinds = {bool: False, int: 0, str: ""}
    nothing = {field.name: kinds.get(field.type, frozenset()) for field in attrs.fields(Features)}
    return Features(**nothing | those)


WATCHING = {"uffd_wp_async": True, "pidfd_getfd": True}


# -- which tracker ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has", "best"),
    [
        (WATCHING | {"soft_dirty": True}, TrackerName.WRITEPROTECT),
        (WATCHING, TrackerName.WRITEPROTECT),
        ({"uffd_wp_async": True}, TrackerName.COMPARE),
        ({"soft_dirty": True}, TrackerName.SOFTDIRTY),
        ({}, TrackerName.COMPARE),
    ],
)
def test_auto_takes_the_best_that_works(has, best):
    assert choose_tracker("auto", features(**has)) is best


@pytest.mark.parametrize(
    ("wanted", "has"),
    [
        ("writeprotect", WATCHING),
        ("softdirty", {"soft_dirty": True}),
        ("compare", {}),
        ("full", {}),
    ],
)
def test_a_tracker_that_is_asked_for_is_used(wanted, has):
    assert choose_tracker(wanted, features(**has)) == wanted


@pytest.mark.parametrize(
    ("wanted", "has", "feature"),
    [
        ("softdirty", {"uffd_wp_async": True}, "CONFIG_MEM_SOFT_DIRTY"),
        ("writeprotect", {"soft_dirty": True}, "Linux 6.7"),
        ("writeprotect", {"uffd_wp_async": True}, "pidfd_getfd"),
    ],
)
def test_a_tracker_that_this_kernel_lacks_is_refused(wanted, has, feature):
    with pytest.raises(FeatureMissing, match=feature) as caught:
        choose_tracker(wanted, features(**has))
    assert caught.value.exit_code == 11
    assert "--tracker auto" in str(caught.value)


def test_a_tracker_that_does_not_exist_is_no_tracker():
    with pytest.raises(ValueError, match="telepathy"):
        choose_tracker("telepathy", features())


# -- delta or full ---------------------------------------------------------------------------------

PROCESS = Identity(boot_id="boot", pid=Pid(70), start_ticks=1000)
EPOCH = Epoch(
    process=PROCESS,
    exec_id="exec",
    chain_id="chain",
    generation=GenerationNo(2),
    digest="00ff",
    tracker=TrackerName.WRITEPROTECT,
    keeper=None,
)


def plan(**changes):
    """Plan a delta that is right, but for the changes."""
    facts = {
        "incremental": True,
        "tracker": TrackerName.WRITEPROTECT,
        "process": PROCESS,
        "exec_id": "exec",
        "chain_id": "chain",
        "generations": [GenerationNo(n) for n in (0, 1, 2, 3)],
        "epoch": EPOCH,
        "lineage_of_process": True,
    }
    return plan_generation(**facts | changes)


def test_a_delta_is_made_against_the_generation_that_armed_the_tracker():
    """Not against the newest: after a restore of an older one these are not the same."""
    assert plan() == Plan(GenerationNo(2), "", by_epoch=True)


def test_no_delta_unless_it_is_asked_for():
    assert plan(incremental=False) == Plan(None, "")


@pytest.mark.parametrize("tracker", TrackerName)
def test_the_first_generation_is_full(tracker):
    made = plan(generations=[], tracker=tracker)
    assert made == Plan(None, "the first generation of a chain is always full")


def test_the_tracker_full_makes_no_delta():
    assert plan(tracker=TrackerName.FULL) == Plan(
        None, "the tracker 'full' knows of no unchanged page"
    )


def test_without_an_epoch_nothing_is_known():
    assert plan(epoch=None) == Plan(None, "this process was not tracked since the last generation")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"process": attrs.evolve(PROCESS, start_ticks=1001)}, "pid 70 is another process"),
        ({"process": attrs.evolve(PROCESS, boot_id="next boot")}, "pid 70 is another process"),
        ({"exec_id": "later"}, "the process has called exec"),
        ({"chain_id": "other"}, "another image directory came in between"),
        ({"tracker": TrackerName.SOFTDIRTY}, "tracked by writeprotect, this one by softdirty"),
        ({"generations": [GenerationNo(n) for n in (0, 1, 3)]}, "generation 2, .* is gone"),
    ],
)
def test_an_epoch_that_does_not_fit_is_not_believed(change, reason):
    made = plan(**change)
    assert made.parent is None
    assert re.search(reason, made.reason)


@pytest.mark.parametrize("epoch", [None, attrs.evolve(EPOCH, chain_id="other")])
def test_compare_needs_no_epoch(epoch):
    made = plan(tracker=TrackerName.COMPARE, epoch=epoch)
    assert made == Plan(GenerationNo(3), ""), "against the newest: it is compared byte by byte"


def test_compare_goes_on_from_the_generation_that_was_restored():
    epoch = attrs.evolve(EPOCH, tracker=TrackerName.COMPARE)
    assert plan(tracker=TrackerName.COMPARE, epoch=epoch) == Plan(
        GenerationNo(2), "", by_epoch=True
    )


def test_compare_does_not_mix_processes():
    made = plan(tracker=TrackerName.COMPARE, epoch=None, lineage_of_process=False)
    assert made == Plan(
        None, "the newest generation is of another process, or it has called exec since"
    )
