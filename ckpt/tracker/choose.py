"""The choice of a tracker, and whether a delta would be right; pure."""

import attrs

from ckpt.errors import FeatureMissing
from ckpt.kernel.features import Features
from ckpt.process.tree import Identity
from ckpt.tracker.base import TrackerName
from ckpt.tracker.epoch import Epoch
from ckpt.units import GenerationNo

AUTO = "auto"
_REMEDY = "use --tracker auto, or compare, which needs nothing"


def choose_tracker(wanted: str, features: Features) -> TrackerName:
    """Return the tracker for `wanted` (a tracker's name, or auto: the best that works here).

    Raises:
        FeatureMissing: this kernel does not have the one that was asked for.
    """
    if wanted == AUTO:
        if features.uffd_wp_async and features.pidfd_getfd:
            return TrackerName.WRITEPROTECT
        return TrackerName.SOFTDIRTY if features.soft_dirty else TrackerName.COMPARE
    name = TrackerName(wanted)
    if name is TrackerName.SOFTDIRTY and not features.soft_dirty:
        raise FeatureMissing("soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)", _REMEDY)
    if name is TrackerName.WRITEPROTECT and not features.uffd_wp_async:
        raise FeatureMissing("asynchronous write-protection (Linux 6.7)", _REMEDY)
    if name is TrackerName.WRITEPROTECT and not features.pidfd_getfd:
        # It is made in the target, and brought to us that way.
        raise FeatureMissing("pidfd_getfd (Linux 5.6)", _REMEDY)
    return name


@attrs.frozen(slots=True, repr=False)
class Plan:
    """What the next generation is made from."""

    parent: GenerationNo | None
    """The generation that a delta is made against; None: a full one."""
    reason: str
    """Why it is full although a delta was asked for; empty otherwise."""
    by_epoch: bool = False
    """The delta relies on the epoch, so the parent must be the very one that it names."""


def plan_generation(
    *,
    incremental: bool,
    tracker: TrackerName,
    process: Identity,
    exec_id: str,
    chain_id: str,
    generations: list[GenerationNo],
    epoch: Epoch | None,
    lineage_of_process: bool,
) -> Plan:
    """Decide between a delta and a full generation, and say why where it is full.

    Args:
        incremental: whether a delta was asked for.
        tracker: that will be used.
        process: whom the dump is of.
        exec_id: which program it runs.
        chain_id: of the image directory.
        generations: that the directory has.
        epoch: of the process, None if there is none.
        lineage_of_process: whether the newest generation is of this process and program; only
            `compare`, which needs no epoch, goes by it (with an epoch it takes the generation that
            the process was restored from: there is less between them).
    """
    if not incremental:
        return Plan(None, "")
    if not generations:
        return Plan(None, "the first generation of a chain is always full")
    if tracker is TrackerName.FULL:
        return Plan(None, "the tracker 'full' knows of no unchanged page")
    distrust = _why_not(
        epoch,
        tracker=tracker,
        process=process,
        exec_id=exec_id,
        chain_id=chain_id,
        generations=generations,
    )
    if epoch is not None and not distrust:
        return Plan(epoch.generation, "", by_epoch=True)
    if tracker is TrackerName.COMPARE:
        if lineage_of_process:
            return Plan(generations[-1], "")
        distrust = "the newest generation is of another process, or it has called exec since"
    return Plan(None, distrust)


def _why_not(
    epoch: Epoch | None,
    *,
    tracker: TrackerName,
    process: Identity,
    exec_id: str,
    chain_id: str,
    generations: list[GenerationNo],
) -> str:
    """Return why the tracker's state says nothing about this chain; empty if it does."""
    if epoch is None:
        return "this process was not tracked since the last generation"
    if epoch.process != process:
        return f"pid {process.pid} is another process than at the last generation"
    if epoch.exec_id != exec_id:
        return "the process has called exec since the last generation"
    if epoch.chain_id != chain_id:
        return "a dump into another image directory came in between"
    if epoch.tracker != tracker:
        return f"the last generation was tracked by {epoch.tracker}, this one by {tracker}"
    if epoch.generation not in generations:
        return f"generation {epoch.generation}, which it would be based on, is gone"
    return ""
