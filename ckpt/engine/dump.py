"""A dump, from start to end.

look          everything that cannot be captured is named before anything is stopped
decide        tracker; delta or full, by the epoch
rounds        memory is copied while the target runs, until little is left (`live`)
freeze        everything is taken, and the target goes on (`taking`); with `kill` it stays frozen
commit        compress, write, one rename
advance       the epoch is now the new generation
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import attrs

from ckpt import fault
from ckpt.engine.capture import examine
from ckpt.engine.convergence import DEFAULT_BUDGET_MS, Budget, Round
from ckpt.engine.copying import Copy
from ckpt.engine.hooks import run_hook
from ckpt.engine.members import Members
from ckpt.engine.records import encode_tree
from ckpt.engine.steps import Steps
from ckpt.engine.taking import Taking
from ckpt.errors import DumpTimeout, HostFull, TargetGone, UsageError
from ckpt.image.access import ANYBODYS, Access
from ckpt.image.chain import Chain
from ckpt.image.format import Kind, Manifest
from ckpt.image.keys import Recipient
from ckpt.image.pipeline import PRESSED_LEVEL
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate
from ckpt.image.writer import WriterOptions
from ckpt.kernel.features import probe_features
from ckpt.kernel.procfs.mountinfo import Mount
from ckpt.process.freezer import DEFAULT_TIMEOUT_S
from ckpt.process.time_limit import TimeIsUp, TimeLimit, time_limit
from ckpt.process.tree import reachable_as, refuse_untouchable
from ckpt.resources.base import CaptureOptions
from ckpt.resources.registry import beside, reachable
from ckpt.tracker.choose import AUTO, choose_tracker
from ckpt.tracker.epoch import Epoch, advance_each
from ckpt.units import GenerationNo, Pid

_WRITING = WriterOptions(pressed_level=PRESSED_LEVEL)
_BEGIN_COMPARING_MS = 1.0
"""What copying must cost at least, for comparing to be done after the thaw."""

_WORTH_TELLING_BYTES = 1 << 20
_STUCK = "something does not answer (a disk?); the next dump removes what this one has begun"
_UNNOTED = "the generation is there, and could not be noted as the newest: "
_STAYS = "the process goes on here, and its checkpoint is on disk"
"""What a command of `--on-departure` that fails has done to the target."""


@attrs.frozen
class DumpOptions:
    """How a dump is done."""

    incremental: bool = False
    kill: bool = False
    tcp_close: bool = False
    """Connections are not kept: they come back closed, and no packet is held for them."""
    tracker: str = AUTO
    freeze_timeout_s: float = DEFAULT_TIMEOUT_S
    timeout_s: float | None = None
    """How long all of it may take, until it is on the disk; None: as long as it takes."""
    if_stuck: Callable[[DumpTimeout], None] | None = None
    """Called by another thread if not even giving up comes to an end, since a disk does not answer;
    it ends this process. None: that is waited for."""
    max_freeze_ms: float = DEFAULT_BUDGET_MS
    """How long copying may take while the target stands, if it can be helped."""
    ghost_limit_bytes: int = 1 << 20
    """How much of a deleted file may travel in the image."""
    external: Collection[str] = ()
    """What leads outside the tree, and will be given to the restore: see `CaptureOptions`."""
    on_departure: str = ""
    """With `kill`: a command that is run right before, when all is stored and the network is held;
    it takes the addresses of the tree from this host."""
    encrypt_to: tuple[Recipient, ...] = ()
    """Who can read a new chain; one that is there stays as it is, and must not be of others."""
    access: Access = ANYBODYS
    """How the chain is read; a delta needs no private key, unless old pages must be compared."""


@attrs.frozen
class PageCounts:
    """How many pages of each fate a generation has."""

    data: int
    """Stored in it; what processes share is stored once, and counts for each."""
    parent: int
    """Unchanged: an ancestor has them."""
    zero: int
    """Not stored: never touched, or still the mapped file's own."""


@attrs.frozen
class DumpResult:
    """What a dump made."""

    generation: GenerationNo
    kind: Kind
    tracker: str
    reason: str
    """Why it is full although a delta was asked for; empty otherwise."""
    freeze_ms: float
    """How long the target stood still; if it was stopped more than once, all of it together."""
    wall_ms: float
    pages: PageCounts
    stored_bytes: int
    rounds: tuple[Round, ...] = ()
    """What was copied before the freeze."""
    warnings: tuple[str, ...] = ()


def dump(pid: int, directory: str | Path, options: DumpOptions | None = None) -> DumpResult:
    """Checkpoint the process `pid` into the image directory; it goes on unless `kill`.

    State:  any; the target is stopped for a part of the call, see `DumpResult.freeze_ms`.

    Raises:
        TargetError: the process is gone, may not be touched, or owns something unsupported; or the
            time is over (`DumpTimeout`).
        HostError: this kernel or this user cannot do it.
        ImageError: the directory is no chain, is busy, or damaged.
    """
    started_s = time.monotonic()
    options = options or DumpOptions()
    if options.on_departure and not options.kill:
        raise UsageError("--on-departure is for a process that leaves: give --kill too")
    try:
        with _limited(pid, options) as limit:
            root = reachable_as(Pid(pid))
            refuse_untouchable(root)
            # From a mount namespace of the tree's own, only a relative path leads back here.
            found_from_there = reachable(directory)
            with beside(root) as mounts:
                chain_at = found_from_there if mounts else Path(directory)
                return _dump(root, chain_at, options, mounts, started_s, limit)
    except TimeIsUp:
        raise _too_long(pid, options) from None


def _limited(pid: int, options: DumpOptions) -> "contextlib.AbstractContextManager[TimeLimit]":
    if_stuck = options.if_stuck
    if if_stuck is None:
        return time_limit(options.timeout_s)
    error = _too_long(pid, options, _STUCK)
    return time_limit(options.timeout_s, lambda: if_stuck(error))


def _too_long(pid: int, options: DumpOptions, left: str = "nothing was added") -> DumpTimeout:
    return DumpTimeout(Pid(pid), options.timeout_s or 0.0, left)


def _dump(
    root: Pid,
    directory: Path,
    options: DumpOptions,
    mounts: tuple[Mount, ...],
    started_s: float,
    limit: TimeLimit,
) -> DumpResult:
    """Do so from where the paths of the tree lead."""
    steps = Steps("dump")
    features = probe_features()
    tracker = choose_tracker(options.tracker, features)
    with contextlib.ExitStack() as stack:
        looked = examine(
            root,
            features,
            CaptureOptions(
                kill=options.kill,
                tcp_close=options.tcp_close,
                ghost_limit_bytes=options.ghost_limit_bytes,
                external=options.external,
                departs=bool(options.on_departure),
                mounts=mounts,
            ),
        )
        stack.callback(looked.tree.forget)
        fault.reach("dump-looked")
        steps.done("looking", processes=len(looked.targets))
        chain = Chain.create_or_open(directory, options.access, encrypt_to=options.encrypt_to)
        stack.enter_context(chain.lock())
        fault.reach("dump-locked")
        members = Members(root, tracker, features, stack)
        of_memory = looked.tree.memory_owners()
        for each in looked.targets:
            if each not in of_memory:
                members.add(each)
        plan = members.decide(chain, incremental=options.incremental)
        fault.reach("dump-decided")
        with chain.begin(plan.parent, options=_WRITING) as writer:
            parent = None
            if plan.parent is not None:
                parent = PageReader(chain, plan.parent)
                members.hold(parent.manifest)
            steps.done("deciding", tracker=tracker, parent=plan.parent, reason=plan.reason)
            taking = Taking(
                looked=looked,
                members=members,
                copy=Copy(writer),
                parent=parent,
                kill=options.kill,
                max_freeze_ms=options.max_freeze_ms,
                freeze_timeout_s=options.freeze_timeout_s,
            )
            stack.callback(taking.forget)
            fault.reach("dump-begun")
            taking.remove_leftovers()
            # Nobody waits for a process that ends with its dump.
            outcome = taking.rounds().run(None if options.kill else Budget(options.max_freeze_ms))
            steps.done("copying while it runs", rounds=len(outcome.rounds))
            stack.enter_context(steps.held())
            with taking.take(outcome) as taken:
                if not options.kill:
                    steps.release()
                steps.done("freezing and taking", frozen_ms=round(taking.stopped_ms, 3))
                manifest = writer.commit(
                    spaces=taken.spaces(),
                    records=encode_tree(taken.image),
                    host=_host_facts(members),
                    tracker=tracker,
                    reason=plan.reason,
                    freeze_ms=taking.stopped_ms + (taken.standing_ms if options.kill else 0),
                    wall_ms=(time.monotonic() - started_s) * 1000,
                    at_last=limit.settle,
                )
                if writer.unnoted:
                    taking.warnings.append(_UNNOTED + writer.unnoted)
                fault.reach("dump-committed")
                steps.done("committing", bytes=manifest.stored_bytes)
                if options.kill:
                    run_hook("--on-departure", options.on_departure, _STAYS, CKPT_PID=root)
                    taken.doom()
                    fault.reach("dump-doomed")
                    taken.kill()
                    fault.reach("dump-killed")
            if not options.kill:
                _advance(taking, chain, manifest)
    return _result_of(manifest, outcome.rounds, taking.warnings)


def _advance(taking: Taking, chain: Chain, manifest: Manifest) -> None:
    """Note of every process that its tracker is armed against this generation."""
    try:
        advance_each(_iter_epochs(taking, chain, manifest))
    except HostFull as error:
        taking.warnings.append(str(error))
    fault.reach("dump-advanced")


def _iter_epochs(taking: Taking, chain: Chain, manifest: Manifest) -> Iterator[Epoch]:
    """Yield the epochs; each is to be written before the next: it names a keeper that runs."""
    for member in taking.members.by_pid.values():
        # It may have ended after the thaw: nobody will ask for what its tracker knows.
        with contextlib.suppress(TargetGone):
            yield member.tracking.epoch(chain.chain_id, manifest.generation, manifest.digest)


def _host_facts(members: Members) -> dict[str, object]:
    """Return what a restore, a user or the next dump may want to know of where this was made."""
    root = members.by_pid[members.root].tracking
    return {
        "pid": members.root,
        "exec_id": root.exec_id,
        "boot_id": root.process.boot_id,
        "start_ticks": root.process.start_ticks,
        "kernel_release": members.features.kernel_release,
        "machine": members.features.machine,
        "xsave_bytes": members.features.xsave_bytes,
        "hostname": os.uname().nodename,
    }


def count_pages(manifest: Manifest) -> PageCounts:
    """Return the pages of a generation by what became of them."""
    totals = manifest.totals()
    return PageCounts(
        data=totals[Fate.DATA],
        parent=totals[Fate.PARENT],
        zero=totals[Fate.ZERO] + totals[Fate.FILE],
    )


def _result_of(manifest: Manifest, rounds: tuple[Round, ...], warnings: list[str]) -> DumpResult:
    return DumpResult(
        generation=manifest.generation,
        kind=manifest.kind,
        tracker=manifest.tracker,
        reason=manifest.reason,
        freeze_ms=manifest.freeze_ms,
        wall_ms=manifest.wall_ms,
        pages=count_pages(manifest),
        stored_bytes=manifest.stored_bytes,
        rounds=rounds,
        warnings=tuple(warnings),
    )
