"""A dump, from start to end.

look          everything that cannot be captured is named before anything is stopped
decide        tracker; delta or full, by the epoch
rounds        memory is copied while the target runs, until little is left (`live`)
freeze        all threads stop
  capture     registers and all resources, in one batch per process and thread
  twin        if the rest is too much for a freeze: a copy-on-write clone (`process/twin`)
  scan        what was written since the last round; the tracker is armed again
  copy        those pages, into buffers that were touched before
thaw          (with `kill`: the target stays frozen to its end)
copy          the rest, out of the twin
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
from ckpt.engine.convergence import DEFAULT_BUDGET_MS
from ckpt.engine.copying import Copy, DropEqual, Pool
from ckpt.engine.deciding import decide_plan
from ckpt.engine.identity import read_exec_id
from ckpt.engine.live import Outcome, Round, Rounds
from ckpt.engine.pages import (
    Held,
    build_runs,
    covered,
    find_newest,
    own_mappings,
    spans_without_twin,
    untrusted_spans,
)
from ckpt.engine.records import ProcessImage, encode_processes, space_name
from ckpt.engine.tracking import Tracking, tracking
from ckpt.errors import HostFull
from ckpt.image.chain import Chain
from ckpt.image.format import Kind, Manifest
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate
from ckpt.image.writer import PRESSED_LEVEL, GenerationWriter, WriterOptions
from ckpt.kernel import ptrace
from ckpt.kernel.features import Features, probe_features
from ckpt.process.arena import arena
from ckpt.process.freezer import DEFAULT_TIMEOUT_S, Frozen, forget, freeze
from ckpt.process.tree import list_tids, read_identity, refuse_untouchable
from ckpt.process.twin import Twin, cost_ms, find_obstacle, twin
from ckpt.resources.base import Target
from ckpt.resources.memory import MemoryRecord
from ckpt.tracker.base import TELLING, TrackerName
from ckpt.tracker.choose import AUTO, Plan, choose_tracker
from ckpt.tracker.epoch import read_epoch
from ckpt.tracker.spans import Spans, intersect, subtract, total_bytes
from ckpt.units import GenerationNo, Pid

_WRITING = WriterOptions(pressed_level=PRESSED_LEVEL)
_BEGIN_COMPARING_MS = 1.0
"""What copying must cost at least, for comparing to be done after the thaw."""

_WORTH_TELLING_BYTES = 1 << 20


@attrs.frozen
class DumpOptions:
    """How a dump is done."""

    incremental: bool = False
    kill: bool = False
    tracker: str = AUTO
    freeze_timeout_s: float = DEFAULT_TIMEOUT_S
    max_freeze_ms: float = DEFAULT_BUDGET_MS
    """How long copying may take while the target stands, if it can be helped."""


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
    """How long the target stood still; if it was stopped more than once, all of it together."""
    wall_ms: float
    pages: PageCounts
    stored_bytes: int
    rounds: tuple[Round, ...] = ()
    """What was copied before the freeze."""
    warnings: tuple[str, ...] = ()


@attrs.define(repr=False)
class _Work:
    """One dump under way."""

    target: Target
    options: DumpOptions
    tracking: Tracking
    plan: Plan
    writer: GenerationWriter
    copy: Copy
    held: Held
    parent: PageReader | None
    """Reads the generation that a delta is made against."""
    stopped_ms: float = 0.0
    """How long the target stood still so far."""
    obstacle: str = ""
    """Why the target could not be cloned, if that was wanted."""
    warnings: list[str] = attrs.Factory(list)

    @property
    def pid(self) -> Pid:
        """The process."""
        return self.target.pid

    @property
    def features(self) -> Features:
        """What this kernel can do."""
        return self.target.features

    @property
    def compares(self) -> bool:
        """Whether each page is compared with what the parent holds of it."""
        return self.parent is not None and self.tracking.name is TrackerName.COMPARE

    def read(self, pid: Pid, wanted: Spans, pool: Pool) -> None:
        """Read pages of the target, or of what has its memory; see `Copy.read_whole`."""
        drop = None
        if self.parent is not None and self.compares:
            drop = DropEqual(self.parent, space_name(self.pid))
        self.held.add(self.copy.read_whole(pid, wanted, pool, drop))

    def look_again(self) -> None:
        """Look at the target anew, for the freeze to confirm.

        Raises:
            UnsupportedState: it has come to own what cannot be captured.
        """
        self.target = examine(self.pid, self.features)

    def warn_of(self, n_bytes: int) -> None:
        """Say that so much was copied while the target stood, if it was more than wanted."""
        if self.options.kill or n_bytes < _WORTH_TELLING_BYTES:
            return
        why = "it writes faster than it is copied"
        if self.obstacle:
            why = f"there was no clone of it to copy from, since {self.obstacle}"
        self.warnings.append(
            f"{n_bytes >> 20} MiB were copied while the process stood still, more than fits into"
            f" {self.options.max_freeze_ms:g} ms: {why}"
        )

    @contextlib.contextmanager
    def stop(self) -> Iterator[Frozen]:
        """Freeze the target for the length of the block, and count how long that was."""
        trace = ptrace.Option.NONE
        if "sys_admin" in self.features.capabilities:
            trace |= ptrace.Option.SUSPEND_SECCOMP
        with freeze(self.pid, trace, self.options.freeze_timeout_s) as frozen:
            yield frozen
        self.stopped_ms += frozen.freeze_ms


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
        plan = decide_plan(chain, lent, epoch, incremental=options.incremental)
        with chain.begin(plan.parent, options=_WRITING) as writer:
            work = _prepare(target, options, chain, lent, plan, writer)
            outcome = _copy_live(work)
            manifest = _run(work, outcome, started_s)
            if not options.kill:
                try:
                    lent.advance(chain.chain_id, manifest.generation, manifest.digest)
                except HostFull as error:
                    work.warnings.append(str(error))
    return _result_of(manifest, outcome.rounds, work.warnings)


def _prepare(
    target: Target,
    options: DumpOptions,
    chain: Chain,
    lent: Tracking,
    plan: Plan,
    writer: GenerationWriter,
) -> _Work:
    """Do everything slow that needs no frozen target."""
    parent, held = None, Held([])
    if plan.parent is not None:
        parent = PageReader(chain, plan.parent)
        if lent.name in TELLING:
            held = Held(covered(parent.manifest.spaces[space_name(target.pid)]))
    return _Work(target, options, lent, plan, writer, Copy(writer), held, parent)


def _copy_live(work: _Work) -> Outcome:
    """Copy what can be copied while the target runs."""
    rounds = Rounds(
        tracking=work.tracking,
        features=work.features,
        copy=work.copy,
        held=work.held,
        stop=work.stop,
        look=work.look_again,
        n_threads=len(list_tids(work.pid)),
        page_size=work.writer.page_size,
    )
    # Nobody waits for a process that ends with its dump.
    return rounds.run(None if work.options.kill else work.options.max_freeze_ms)


def _wants_twin(work: _Work, outcome: Outcome) -> bool:
    """Tell whether a clone would stop the target for less long than copying the rest."""
    if work.options.kill:
        return False
    clone_ms = cost_ms(total_bytes(outcome.likely))
    if work.compares:
        # Reading what the parent holds takes longer than anything else.
        return outcome.rest.copy_ms > _BEGIN_COMPARING_MS
    return not outcome.fits and clone_ms < outcome.rest.copy_ms


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


def _run(work: _Work, outcome: Outcome, started_s: float) -> Manifest:
    """Freeze, take everything, thaw, commit."""
    # And as much again, for what is written until the freeze.
    pool = Pool(2 * outcome.rest.n_bytes)
    with _without_gc(), contextlib.ExitStack() as twins, contextlib.ExitStack() as stack:
        frozen = stack.enter_context(work.stop())
        image, cloned = _capture(work, frozen, twins if _wants_twin(work, outcome) else None)
        memory: MemoryRecord = image.resources["memory"]
        scan = work.tracking.collect(own_mappings(memory), outcome.likely)
        distrusted = untrusted_spans(memory)
        aside = spans_without_twin(memory) if cloned else []
        if cloned is None or aside:
            rest = work.held.see(scan, distrusted)
            first = intersect(rest, aside) if cloned else rest
            work.read(work.pid, first, pool)
        if not work.options.kill:
            stack.close()
        work.copy.store_all()
        if cloned is not None:
            # With nothing to read before the thaw, even what there is to read is found out now.
            rest, first = (rest, first) if aside else (work.held.see(scan, distrusted), [])
            work.read(cloned.pid, subtract(rest, first), pool)
            work.copy.store_all()
            twins.close()
        if work.compares:
            # What was not copied is as the parent has it.
            work.held.add(scan.populated)
        if cloned is None and not outcome.fits:
            work.warn_of(total_bytes(rest))
        manifest = _commit(work, frozen, image, started_s)
        if work.options.kill:
            _kill(frozen)
    return manifest


def _commit(work: _Work, frozen: Frozen, image: ProcessImage, started_s: float) -> Manifest:
    image = settle(image)
    memory: MemoryRecord = image.resources["memory"]
    page_size = work.writer.page_size
    copied, parent = work.held.tell_apart(work.copy.rounds)
    copies = find_newest(work.copy.rounds, copied, page_size)
    return work.writer.commit(
        spaces={image.space: build_runs(memory, copies, parent, page_size)},
        records=encode_processes([image]),
        host=_host_facts(work),
        tracker=work.tracking.name,
        reason=work.plan.reason,
        freeze_ms=work.stopped_ms + (_ms_since_stop(frozen) if work.options.kill else 0),
        wall_ms=(time.monotonic() - started_s) * 1000,
    )


def _ms_since_stop(frozen: Frozen) -> float:
    return (time.monotonic() - frozen.frozen_at_s) * 1000


def _capture(
    work: _Work, frozen: Frozen, twins: contextlib.ExitStack | None
) -> tuple[ProcessImage, Twin | None]:
    """Capture all resources; clone the process if there is where to keep the clone."""
    capturing = Capturing(frozen, work.target)
    with arena(work.pid, frozen.tgid, frozen.leader) as lent:
        image = capturing.finish(lent)
        work.tracking.attach(lent, frozen.leader)
        if twins is None:
            return image, None
        adopts = bool(image.resources["identity"].child_subreaper)
        work.obstacle = find_obstacle(frozen, adopts_orphans=adopts)
        cloned = None if work.obstacle else twins.enter_context(twin(lent, frozen))
    if cloned is None and not work.obstacle:
        work.obstacle = "the kernel refused to clone it"
    return image, cloned


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
