"""A dump, from start to end.

look          everything that cannot be captured is named before anything is stopped
decide        tracker; delta or full, by the epoch
freeze        all threads stop
  capture     registers and all resources, in one batch per process and thread
  scan        what was written since the epoch; the tracker is armed again
  copy        those pages, into buffers that were touched before
thaw          (with `kill`: the target stays frozen to its end)
commit        compress, write, one rename
advance       the epoch is now the new generation
"""

import contextlib
import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import attrs

from ckpt.engine.capture import Capturing, examine, settle
from ckpt.engine.identity import read_exec_id
from ckpt.engine.pages import (
    Copy,
    DropEqual,
    Pool,
    build_runs,
    covered,
    own_mappings,
    split,
    untrusted_spans,
)
from ckpt.engine.records import ProcessImage, encode_processes, space_name
from ckpt.engine.tracking import Tracking, drop_epoch, tracking
from ckpt.errors import HostFull, ImageError
from ckpt.image.chain import Chain
from ckpt.image.format import Kind, Manifest
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate
from ckpt.image.writer import GenerationWriter
from ckpt.kernel import ptrace
from ckpt.kernel.features import Features, probe_features
from ckpt.kernel.procfs import maps
from ckpt.process.arena import arena
from ckpt.process.freezer import DEFAULT_TIMEOUT_S, Frozen, forget, freeze
from ckpt.process.tree import read_identity, refuse_untouchable
from ckpt.resources.base import Target
from ckpt.resources.memory import MemoryRecord, iter_own_vmas
from ckpt.tracker.base import TrackerName
from ckpt.tracker.choose import AUTO, Plan, choose_tracker, plan_generation
from ckpt.tracker.epoch import Epoch, read_epoch
from ckpt.tracker.populated import opened_pagemap, scan_populated, scan_written
from ckpt.tracker.spans import Own, Spans, join, subtract, total_bytes
from ckpt.units import GenerationNo, Pid


@attrs.frozen
class DumpOptions:
    """How a dump is done."""

    incremental: bool = False
    kill: bool = False
    tracker: str = AUTO
    freeze_timeout_s: float = DEFAULT_TIMEOUT_S


@attrs.frozen
class PageCounts:
    """How many pages of each fate a generation has."""

    data: int
    """Stored in it."""
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
    wall_ms: float
    pages: PageCounts
    stored_bytes: int
    warnings: tuple[str, ...] = ()


@attrs.define
class _Work:
    """One dump under way."""

    target: Target
    options: DumpOptions
    tracking: Tracking
    plan: Plan
    writer: GenerationWriter
    pool: Pool
    parent: PageReader | None
    """Reads the generation that a delta is made against."""
    in_parent: Spans
    """The pages that it holds."""

    @property
    def pid(self) -> Pid:
        """The process."""
        return self.target.pid

    @property
    def features(self) -> Features:
        """What this kernel can do."""
        return self.target.features


def dump(pid: int, directory: str | Path, options: DumpOptions | None = None) -> DumpResult:
    """Checkpoint the process `pid` into the image directory; it goes on unless `kill`.

    State:  any; the target is stopped for a part of the call, see `DumpResult.freeze_ms`.

    Raises:
        TargetError: the process is gone, may not be touched, or owns something unsupported.
        HostError: this kernel or this user cannot do it.
        ImageError: the directory is no chain, is busy, or damaged.
    """
    started_s = time.monotonic()
    options = options or DumpOptions()
    refuse_untouchable(Pid(pid))
    features = probe_features()
    tracker = choose_tracker(options.tracker, features)
    target = examine(Pid(pid), features)
    process, exec_id = read_identity(target.pid), read_exec_id(target.pid)
    chain = Chain.create_or_open(Path(directory))
    with chain.lock(), tracking(process, exec_id, tracker, features) as lent:
        epoch = read_epoch(target.pid)
        plan = _decide(chain, lent, epoch, incremental=options.incremental)
        with chain.begin(plan.parent) as writer:
            work = _prepare(target, options, chain, lent, plan, writer)
            manifest = _run(work, started_s)
            warnings: list[str] = []
            if not options.kill:
                try:
                    lent.advance(chain.chain_id, manifest.generation, manifest.digest)
                except HostFull as error:
                    warnings.append(str(error))
    return _result_of(manifest, warnings)


def _decide(chain: Chain, lent: Tracking, epoch: Epoch | None, *, incremental: bool) -> Plan:
    """Decide what the generation is made from; drop an epoch that is no use any more."""
    plan = plan_generation(
        incremental=incremental,
        tracker=lent.name,
        process=lent.process,
        exec_id=lent.exec_id,
        chain_id=chain.chain_id,
        generations=chain.generations(),
        epoch=epoch,
        lineage_of_process=_newest_is_of(chain, lent),
    )
    if plan.parent is not None:
        plan = _check_parent(chain, plan, plan.parent, epoch)
    if not lent.take_over(epoch):
        if epoch is not None:
            drop_epoch(epoch)
        if plan.parent is not None:
            plan = Plan(None, "the keeper that held the tracker is gone")
    return plan


def _check_parent(chain: Chain, plan: Plan, parent: GenerationNo, epoch: Epoch | None) -> Plan:
    """Take a parent only if it is whole, and is the very one that the tracker is armed against."""
    try:
        digest = chain.lineage(parent)[0].digest
    except ImageError as error:
        return Plan(None, f"the chain is not whole ({error})")
    if plan.by_epoch and (epoch is None or epoch.digest != digest.hex()):
        return Plan(None, f"generation {parent} was replaced by another of that number")
    return plan


def _newest_is_of(chain: Chain, lent: Tracking) -> bool:
    newest = chain.newest()
    if newest is None:
        return False
    host = chain.manifest(newest).host
    return host.get("exec_id") == lent.exec_id and host.get("pid") == lent.pid


def _prepare(
    target: Target,
    options: DumpOptions,
    chain: Chain,
    lent: Tracking,
    plan: Plan,
    writer: GenerationWriter,
) -> _Work:
    """Do everything slow that needs no frozen target."""
    pool = Pool(_estimate_bytes(target, lent.name, plan))
    parent, in_parent = None, []
    if plan.parent is not None:
        parent = PageReader(chain, plan.parent)
        in_parent = covered(parent.manifest.spaces[space_name(target.pid)])
    return _Work(target, options, lent, plan, writer, pool, parent, in_parent)


def _estimate_bytes(target: Target, tracker: TrackerName, plan: Plan) -> int:
    """Return how much memory to touch before the freeze: what may have to be held, roughly."""
    vmas = [vma for vma in iter_own_vmas(maps.read_maps(target.pid)) if not vma.shared]
    own = Own(
        anonymous=join((v.span.start, v.span.end) for v in vmas if not v.is_file),
        mapped=join((v.span.start, v.span.end) for v in vmas if v.is_file),
    )
    with opened_pagemap(target.pid) as fd:
        if plan.parent is not None and tracker is TrackerName.WRITEPROTECT:
            # And as much again, for what is written until the freeze.
            return 2 * total_bytes(scan_written(fd, own.anonymous))
        n_bytes = total_bytes(scan_populated(fd, own, target.features))
    return n_bytes // 8 if plan.parent is not None else n_bytes


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Let no garbage collection of ours fall into the freeze."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _run(work: _Work, started_s: float) -> Manifest:
    """Freeze, take everything, thaw, commit."""
    trace = ptrace.Option.NONE
    if "sys_admin" in work.features.capabilities:
        trace |= ptrace.Option.SUSPEND_SECCOMP
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_gc())
        frozen = stack.enter_context(freeze(work.pid, trace, work.options.freeze_timeout_s))
        image = _capture(work, frozen)
        memory: MemoryRecord = image.resources["memory"]
        copy, parent = _copy(work, memory)
        if not work.options.kill:
            stack.close()
        copy.store_all()
        image = settle(image)
        manifest = work.writer.commit(
            spaces={image.space: build_runs(memory, copy.stored, parent, work.writer.page_size)},
            records=encode_processes([image]),
            host=_host_facts(work),
            tracker=work.tracking.name,
            reason=work.plan.reason,
            freeze_ms=_freeze_ms(frozen),
            wall_ms=(time.monotonic() - started_s) * 1000,
        )
        if work.options.kill:
            _kill(frozen)
    return manifest


def _freeze_ms(frozen: Frozen) -> float:
    """Return how long the target stood still; until now, if it will not run again."""
    return frozen.freeze_ms or (time.monotonic() - frozen.frozen_at_s) * 1000


def _capture(work: _Work, frozen: Frozen) -> ProcessImage:
    capturing = Capturing(frozen, work.target)
    with arena(work.pid, frozen.tgid, frozen.leader) as lent:
        image = capturing.finish(lent)
        work.tracking.attach(lent, frozen.leader)
    return image


def _copy(work: _Work, memory: MemoryRecord) -> tuple[Copy, Spans]:
    """Scan and read what must be stored; return it, and the pages that the parent holds."""
    scan = work.tracking.collect(own_mappings(memory))
    copy = Copy(work.pid, work.writer, work.pool)
    if work.parent is not None and work.tracking.name is TrackerName.COMPARE:
        drop = DropEqual(work.parent, space_name(work.pid))
        copy.read_all(scan.populated, drop)
        return copy, drop.unchanged(scan.populated, copy.stored)
    parts = split(scan, subtract(work.in_parent, untrusted_spans(memory)))
    copy.read_all(parts.data)
    return copy, parts.parent


def _host_facts(work: _Work) -> dict[str, object]:
    """Return what a restore, a user or the next dump may want to know of where this was made."""
    return {
        "pid": work.pid,
        "exec_id": work.tracking.exec_id,
        "boot_id": work.tracking.process.boot_id,
        "start_ticks": work.tracking.process.start_ticks,
        "kernel_release": work.features.kernel_release,
        "machine": work.features.machine,
        "xsave_bytes": work.features.xsave_bytes,
        "hostname": os.uname().nodename,
    }


def _kill(frozen: Frozen) -> None:
    """End the target where it stands; it does not run another instruction."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(frozen.pid, signal.SIGKILL)
    forget(frozen)


def count_pages(manifest: Manifest) -> PageCounts:
    """Return the pages of a generation by what became of them."""
    totals = manifest.totals()
    return PageCounts(
        data=totals[Fate.DATA],
        parent=totals[Fate.PARENT],
        zero=totals[Fate.ZERO] + totals[Fate.FILE],
    )


def _result_of(manifest: Manifest, warnings: list[str]) -> DumpResult:
    return DumpResult(
        generation=manifest.generation,
        kind=manifest.kind,
        tracker=manifest.tracker,
        reason=manifest.reason,
        freeze_ms=manifest.freeze_ms,
        wall_ms=manifest.wall_ms,
        pages=count_pages(manifest),
        stored_bytes=manifest.stored_bytes,
        warnings=tuple(warnings),
    )
