"""Which generations of a chain to keep, and removing the others.

Two rules, and a generation stays if one of them wants it: the newest `keep_last`, and the newest of
each period of `keep_every_s` seconds (periods are counted from 1970, so that a later run cuts time
in the same way). The newest of the chain always stays.

What a kept generation needs of one that goes is merged into it (`squash.fold`); its parent is then
its nearest ancestor that is kept. (Or, for those who cannot open what is encrypted, what it is
based on stays.) So a chain that is pruned after each dump goes on with deltas,
and nothing that is kept ever depends on what is not. The rules are pure: `choose_kept`,
`plan_prune`; `prune` carries them out.
"""

from collections.abc import Collection, Iterable, Mapping

import attrs

from ckpt.errors import UsageError
from ckpt.image.chain import Chain
from ckpt.image.newest import require_newest
from ckpt.image.squash import ancestors_of, fold, remove
from ckpt.units import GenerationNo


@attrs.frozen
class Retention:
    """What to keep; at least one rule must be given.

    Attributes:
        keep_last: how many of the newest, at least 1; None: this rule wants none.
        keep_every_s: length of a period, of which the newest is kept, in seconds; None: none.
    """

    keep_last: int | None = None
    keep_every_s: float | None = None


@attrs.frozen
class Taken:
    """What the rules look at of a generation."""

    number: GenerationNo
    created_s: float
    """Seconds since 1970."""


@attrs.frozen
class PrunePlan:
    """What is to be done, or was."""

    kept: tuple[GenerationNo, ...]
    """Ascending."""
    removed: tuple[GenerationNo, ...]
    """Newest first: whoever is based on another goes before it."""
    folds: tuple[tuple[GenerationNo, GenerationNo | None], ...]
    """Kept generations, ascending, that take in ancestors that go, and their new parent, if any."""


@attrs.frozen
class PruneResult:
    """What `prune` did, or would do."""

    plan: PrunePlan
    stored_before_bytes: int
    """Of all page files."""
    stored_after_bytes: int | None
    """None if nothing was done: what is shared is known only then."""


def choose_kept(generations: Iterable[Taken], retention: Retention) -> set[GenerationNo]:
    """Return the generations that the rules want.

    Raises:
        UsageError: no rule is given, or one makes no sense.
    """
    last, every_s = retention.keep_last, retention.keep_every_s
    if last is None and every_s is None:
        raise UsageError("say what to keep: --keep-last, --keep-every, or both")
    if last is not None and last < 1:
        raise UsageError("--keep-last must be at least 1")
    if every_s is not None and not 0 < every_s < float("inf"):
        raise UsageError("--keep-every must be a duration above zero")
    ordered = sorted(generations, key=lambda taken: taken.number)
    kept = {taken.number for taken in ordered[-(last or 1) :]}
    if every_s is not None:
        newest = {taken.created_s // every_s: taken.number for taken in ordered}
        kept |= set(newest.values())
    return kept


def plan_prune(
    parents: Mapping[GenerationNo, GenerationNo | None], kept: Collection[GenerationNo]
) -> PrunePlan:
    """Say what has to be done so that only `kept` is left, and reads as before.

    Args:
        parents: of every generation of the chain; None: it is full.
        kept: some of them.
    """
    folds: list[tuple[GenerationNo, GenerationNo | None]] = []
    for number in sorted(kept):
        base = next((above for above in ancestors_of(parents, number) if above in kept), None)
        if base != parents[number]:
            folds.append((number, base))
    return PrunePlan(
        kept=tuple(sorted(kept)),
        removed=tuple(sorted(set(parents) - set(kept), reverse=True)),
        folds=tuple(folds),
    )


def prune(
    chain: Chain, retention: Retention, *, dry_run: bool = False, merges: bool = True
) -> PruneResult:
    """Remove what the rules do not keep; see the module.

    Args:
        chain: to be pruned.
        retention: the rules.
        dry_run: change nothing.
        merges: if not, what a kept generation is based on is kept as well; that takes no key.

    Raises:
        UsageError: see `choose_kept`.
        ImageError: a generation cannot be read, what would be merged is damaged, or the newest is
            gone, which may be put back: nothing was removed.
        ImageBusy: the chain is being written, or its pages are being read.
        HostFull: no room to merge; nothing was removed.
    """
    if dry_run:
        with chain.in_use():
            plan, stored_bytes = _plan(chain, retention, merges=merges)
        return PruneResult(plan, stored_bytes, None)
    with chain.lock(), chain.in_use() as use:
        require_newest(chain.store, chain.chain_id)
        plan, before_bytes = _plan(chain, retention, merges=merges)
        if plan.removed:
            use.require_alone()
            for number, base in plan.folds:
                fold(chain, number, base)
            with use.alone():
                remove(chain, plan.removed)
        after_bytes = _stored(chain, plan.kept)
    return PruneResult(plan, before_bytes, after_bytes)


def _plan(chain: Chain, retention: Retention, *, merges: bool) -> tuple[PrunePlan, int]:
    parents: dict[GenerationNo, GenerationNo | None] = {}
    taken: list[Taken] = []
    stored_bytes = 0
    for number in chain.generations():
        manifest = chain.manifest(number)
        parents[number] = manifest.parent.generation if manifest.parent else None
        taken.append(Taken(number, manifest.created_s))
        stored_bytes += manifest.stored_bytes
        chain.forget()
    kept = choose_kept(taken, retention)
    if not merges:
        kept |= {above for number in kept for above in ancestors_of(parents, number)}
    return plan_prune(parents, kept), stored_bytes


def _stored(chain: Chain, numbers: Iterable[GenerationNo]) -> int:
    stored_bytes = 0
    for number in numbers:
        stored_bytes += chain.manifest(number).stored_bytes
        chain.forget()
    return stored_bytes
