"""Delta or full: what the epoch, the chain and the keeper allow, and the reason where it is full.

`tracker/choose.py` has the rules; this asks the chain and the keeper for what they go by.
"""

from ckpt.engine.tracking import Tracking, drop_epoch
from ckpt.errors import ImageCorrupt, ImageError, ImageSealed
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest
from ckpt.tracker.base import TrackerName
from ckpt.tracker.choose import Plan, plan_generation
from ckpt.tracker.epoch import Epoch
from ckpt.units import GenerationNo


def decide_plan(chain: Chain, lent: Tracking, epoch: Epoch | None, *, incremental: bool) -> Plan:
    """Decide what the generation is made from; drop an epoch that is no use any more.

    Raises:
        ImageSealed: old pages would have to be read, and they are encrypted.
        ImageVersion, ChainBroken: the newest generation is a newer ckpt's, or of another chain.
    """
    newest, damage = _newest(chain)
    if incremental and lent.name is TrackerName.COMPARE and newest is not None:
        _require_open(chain, newest)
    plan = plan_generation(
        incremental=incremental,
        tracker=lent.name,
        process=lent.process,
        exec_id=lent.exec_id,
        chain_id=chain.chain_id,
        generations=chain.generations(),
        epoch=epoch,
        lineage_of_process=newest is not None and _is_of(newest, lent),
    )
    if incremental and damage and plan.parent is None:
        plan = Plan(None, damage)
    if plan.parent is not None:
        plan = _check_parent(chain, plan, plan.parent, epoch)
    if not lent.take_over(epoch):
        if epoch is not None:
            drop_epoch(epoch)
        if plan.parent is not None:
            plan = Plan(None, "the keeper that held the tracker is gone")
    return plan


def follow_plan(
    chain: Chain, lent: Tracking, epoch: Epoch | None, parent: GenerationNo | None
) -> bool:
    """Take over the tracker of a process that is not the root; tell whether it goes on from there.

    One that does not is stored whole, in a delta too.
    """
    plan = Plan(None, "")
    if parent is not None:
        plan = plan_generation(
            incremental=True,
            tracker=lent.name,
            process=lent.process,
            exec_id=lent.exec_id,
            chain_id=chain.chain_id,
            generations=[parent],
            epoch=epoch,
            lineage_of_process=True,
        )
        if plan.parent is not None:
            plan = _check_parent(chain, plan, plan.parent, epoch)
    if lent.take_over(epoch):
        return plan.parent is not None
    if epoch is not None:
        drop_epoch(epoch)
    return False


def _check_parent(chain: Chain, plan: Plan, parent: GenerationNo, epoch: Epoch | None) -> Plan:
    """Take a parent only if it is whole, and is the very one that the tracker is armed against.

    One that was squashed since reads the same, and remembers by which digests it was known.
    """
    try:
        digests = chain.lineage(parent)[0].digests
    except ImageError as error:
        return Plan(None, f"the chain is not whole ({error})")
    if plan.by_epoch and (
        epoch is None or epoch.digest not in {digest.hex() for digest in digests}
    ):
        return Plan(None, f"generation {parent} was replaced by another of that number")
    return plan


def _newest(chain: Chain) -> tuple[Manifest | None, str]:
    """Return the newest manifest, if there is one; else why it is of no use, if it is damaged.

    That keeps nobody from making another. What a newer ckpt has made there, or what is of another
    chain, does: nothing is put on top of that.
    """
    newest = chain.newest()
    if newest is None:
        return None, ""
    try:
        return chain.manifest(newest), ""
    except ImageCorrupt as error:
        return None, f"the newest generation is damaged ({error})"


def _require_open(chain: Chain, newest: Manifest) -> None:
    if newest.is_locked:
        raise ImageSealed(
            str(chain.path),
            "the tracker 'compare' reads what is in it, which is encrypted: give --identity, or"
            " another --tracker",
        )


def _is_of(newest: Manifest, lent: Tracking) -> bool:
    if newest.is_locked:
        return False  # Only `compare` asks, and that cannot be.
    host = newest.host
    return host.get("exec_id") == lent.exec_id and host.get("pid") == lent.pid
