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
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import attrs

from ckpt.engine.capture import (
    Capturing,
    Looked,
    capture_zombies,
    examine,
    retarget,
    settle,
)
from ckpt.engine.contents import ContentCopy
from ckpt.engine.convergence import DEFAULT_BUDGET_MS
from ckpt.engine.copying import Copy, DropEqual, Pool
from ckpt.engine.family import refuse_unplannable
from ckpt.engine.live import Outcome, Round, Rounds
from ckpt.engine.members import Member, Members
from ckpt.engine.pages import (
    all_copied,
    build_runs,
    find_newest,
    own_mappings,
    spans_without_twin,
    untrusted_spans,
)
from ckpt.engine.records import ProcessImage, TreeImage, encode_tree
from ckpt.errors import HostFull, TargetGone
from ckpt.image.chain import Chain
from ckpt.image.format import Kind, Manifest
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate, RunTable
from ckpt.image.writer import PRESSED_LEVEL, GenerationWriter, WriterOptions
from ckpt.kernel import ptrace
from ckpt.kernel.features import Features, probe_features
from ckpt.process.arena import Arena, arena
from ckpt.process.freezer import DEFAULT_TIMEOUT_S, Frozen, FrozenTree, forget, freeze_tree
from ckpt.process.tree import refuse_untouchable
from ckpt.process.twin import Twin, cost_ms, find_obstacle, twin
from ckpt.resources.base import CaptureOptions, Target, run_all
from ckpt.resources.content import NOTE, likely_bytes
from ckpt.resources.memory import MemoryRecord
from ckpt.tracker.base import Scan, TrackerName
from ckpt.tracker.choose import AUTO, Plan, choose_tracker
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
    tcp_close: bool = False
    """Connections are not kept: they come back closed, and no packet is held for them."""
    tracker: str = AUTO
    freeze_timeout_s: float = DEFAULT_TIMEOUT_S
    max_freeze_ms: float = DEFAULT_BUDGET_MS
    """How long copying may take while the target stands, if it can be helped."""
    ghost_limit_bytes: int = 1 << 20
    """How much of a deleted file may travel in the image."""


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

    looked: Looked
    options: DumpOptions
    members: Members
    plan: Plan
    writer: GenerationWriter
    copy: Copy
    parent: PageReader | None
    """Reads the generation that a delta is made against."""
    contents: ContentCopy = attrs.field(init=False)
    stopped_ms: float = 0.0
    """How long the target stood still so far."""
    obstacle: str = ""
    """Why a process could not be cloned, if that was wanted."""
    warnings: list[str] = attrs.Factory(list)

    @property
    def root(self) -> Pid:
        """The process that all others descend from."""
        return self.members.root

    @property
    def features(self) -> Features:
        """What this kernel can do."""
        return self.members.features

    @property
    def compares(self) -> bool:
        """Whether each page is compared with what the parent holds of it."""
        return self.parent is not None and self.members.tracker is TrackerName.COMPARE

    def read(self, member: Member, pid: Pid, wanted: Spans, pool: Pool) -> None:
        """Read pages of a member, or of what has its memory; see `Copy.read_whole`."""
        drop = None
        parent = self.parent if self.compares else None
        if parent is not None and member.space in parent.manifest.spaces:
            drop = DropEqual(parent, member.space)
        member.held.add(self.copy.read_whole(member.space, pid, wanted, pool, drop))

    def look_again(self) -> None:
        """Look at the target anew, for the freeze to confirm.

        Raises:
            UnsupportedState: it has come to own what cannot be captured.
        """
        self.looked = examine(self.root, self.features, self.looked.tree.options)

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
    def stop(self) -> Iterator[FrozenTree]:
        """Freeze the target for the length of the block, and count how long that was."""
        trace = ptrace.Option.NONE
        if "sys_admin" in self.features.capabilities:
            trace |= ptrace.Option.SUSPEND_SECCOMP
        with freeze_tree(self.root, trace, self.options.freeze_timeout_s) as frozen:
            yield frozen
        self.stopped_ms += frozen.freeze_ms


@attrs.define(repr=False, slots=False)
class _Part:
    """What one process contributes to the generation."""

    member: Member
    image: ProcessImage
    twin: Twin | None
    scan: Scan = attrs.field(init=False)
    first: Spans = attrs.Factory(list)
    """What was read before the thaw."""

    @property
    def memory(self) -> MemoryRecord:
        """Its address space."""
        memory: MemoryRecord = self.image.resources["memory"]
        return memory

    @property
    def aside(self) -> Spans:
        """What of its memory the twin does not have."""
        return spans_without_twin(self.memory) if self.twin else []

    @cached_property
    def rest(self) -> Spans:
        """What the image does not hold, by the last scan; what is read later changes nothing of it.

        Held pages are told of a scan only once: it would call those dirty that were read since.
        """
        return self.member.held.see(self.scan, untrusted_spans(self.memory))


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
    root = Pid(pid)
    refuse_untouchable(root)
    features = probe_features()
    tracker = choose_tracker(options.tracker, features)
    looked = examine(
        root,
        features,
        CaptureOptions(
            kill=options.kill,
            tcp_close=options.tcp_close,
            ghost_limit_bytes=options.ghost_limit_bytes,
        ),
    )
    chain = Chain.create_or_open(Path(directory))
    with chain.lock(), contextlib.ExitStack() as stack:
        members = Members(root, tracker, features, stack)
        for each in looked.targets:
            members.add(each)
        plan = members.decide(chain, incremental=options.incremental)
        with chain.begin(plan.parent, options=_WRITING) as writer:
            parent = None
            if plan.parent is not None:
                parent = PageReader(chain, plan.parent)
                members.hold(parent.manifest)
            work = _Work(looked, options, members, plan, writer, Copy(writer), parent)
            outcome = _copy_live(work)
            manifest = _run(work, outcome, started_s)
            if not options.kill:
                _advance(work, chain, manifest)
    return _result_of(manifest, outcome.rounds, work.warnings)


def _advance(work: _Work, chain: Chain, manifest: Manifest) -> None:
    """Note of every process that its tracker is armed against this generation."""
    for member in work.members.by_pid.values():
        try:
            member.tracking.advance(chain.chain_id, manifest.generation, manifest.digest)
        except HostFull as error:
            work.warnings.append(str(error))
        except TargetGone:
            # It ended after the thaw: nobody will ask for what its tracker knows.
            continue


def _copy_live(work: _Work) -> Outcome:
    """Copy what can be copied while the target runs."""
    rounds = Rounds(
        members=work.members,
        copy=work.copy,
        stop=work.stop,
        look=work.look_again,
        page_size=work.writer.page_size,
    )
    # Nobody waits for a process that ends with its dump.
    return rounds.run(None if work.options.kill else work.options.max_freeze_ms)


def _wants_twin(work: _Work, outcome: Outcome) -> bool:
    """Tell whether clones would stop the target for less long than copying the rest."""
    if work.options.kill:
        return False
    clone_ms = sum(cost_ms(total_bytes(one.likely)) for one in work.members.by_pid.values())
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
    work.contents = ContentCopy(work.copy, work.parent, likely_bytes(work.looked.tree.notes))
    with (
        contextlib.ExitStack() as at_end,
        _without_gc(),
        contextlib.ExitStack() as twins,
        contextlib.ExitStack() as stack,
    ):
        frozen = stack.enter_context(work.stop())
        targets = retarget(frozen, work.looked, work.features)
        tree = targets[work.root].tree
        stack.callback(run_all, tree.at_thaw)
        at_end.callback(run_all, tree.at_end)
        wanted = twins if _wants_twin(work, outcome) else None
        parts = _capture(work, frozen, targets, wanted)
        zombies = capture_zombies(frozen)
        refuse_unplannable(tuple(part.image for part in parts), zombies)
        n_bytes = _copy_frozen(work, parts, pool)
        work.contents.read(work.looked.tree.notes.get(NOTE, ()))
        if not work.options.kill:
            stack.close()
        work.copy.store_all()
        _copy_twins(work, parts, pool)
        twins.close()
        work.contents.store()
        if work.compares:
            for part in parts:
                # What was not copied is as the parent has it.
                part.member.held.add(part.scan.populated)
        if not outcome.fits:
            work.warn_of(n_bytes)
        image = TreeImage(tuple(part.image for part in parts), zombies)
        manifest = _commit(work, frozen, image, started_s)
        if work.options.kill:
            run_all(tree.at_kill)
            _kill(frozen)
    return manifest


def _copy_frozen(work: _Work, parts: list[_Part], pool: Pool) -> int:
    """Scan all for the last time, and read what no clone has.

    Returns how many bytes that were, of the processes that have no clone.
    """
    for part in parts:
        own = own_mappings(part.memory)
        part.scan = part.member.tracking.collect(own, part.member.likely)
    n_bytes = 0
    for part in parts:
        if part.twin is None:
            part.first = part.rest
            n_bytes += total_bytes(part.first)
        elif part.aside:
            part.first = intersect(part.rest, part.aside)
        work.read(part.member, part.member.pid, part.first, pool)
    return n_bytes


def _copy_twins(work: _Work, parts: list[_Part], pool: Pool) -> None:
    """Read the rest out of the clones; what there is to read is found out only now."""
    for part in parts:
        if part.twin is not None:
            work.read(part.member, part.twin.pid, subtract(part.rest, part.first), pool)
    work.copy.store_all()


def _commit(work: _Work, frozen: FrozenTree, tree: TreeImage, started_s: float) -> Manifest:
    tree = settle(tree)
    memory = {process.space: _build_runs(work, process) for process in tree.processes}
    return work.writer.commit(
        spaces=memory | work.contents.tables(),
        records=encode_tree(tree),
        host=_host_facts(work),
        tracker=work.members.tracker,
        reason=work.plan.reason,
        freeze_ms=work.stopped_ms + (_ms_since_stop(frozen) if work.options.kill else 0),
        wall_ms=(time.monotonic() - started_s) * 1000,
    )


def _build_runs(work: _Work, process: ProcessImage) -> RunTable:
    """Return where each page of a process is."""
    stream, page_size = work.copy.stream, work.writer.page_size
    held = work.members.by_pid[process.pid].held
    copied, parent = held.tell_apart(all_copied(stream, process.space))
    copies = find_newest(stream, process.space, copied, page_size)
    return build_runs(process.resources["memory"], copies, parent, page_size)


def _ms_since_stop(frozen: FrozenTree) -> float:
    return (time.monotonic() - frozen.frozen_at_s) * 1000


def _capture(
    work: _Work,
    frozen: FrozenTree,
    targets: Mapping[Pid, Target],
    twins: contextlib.ExitStack | None,
) -> list[_Part]:
    """Capture all resources; clone the processes if there is where to keep the clones."""
    # All that can be read from outside first, while no process has a mapping of ours.
    capturing = {pid: Capturing(one, targets[pid]) for pid, one in frozen.processes.items()}
    work.members.keep_only(frozen.processes)
    parts: list[_Part] = []
    for pid, one in frozen.processes.items():
        member = work.members.by_pid.get(pid) or work.members.add(pid)
        with arena(pid, one.tgid, one.leader) as lent:
            image = capturing[pid].finish(lent)
            member.tracking.attach(lent, one.leader)
            part = _Part(member, image, None)
            parts.append(part)
            if twins is not None:
                part.twin = _clone(work, lent, one, parts, twins)
    return parts


def _clone(
    work: _Work, lent: Arena, frozen: Frozen, parts: list[_Part], twins: contextlib.ExitStack
) -> Twin | None:
    """Clone a process, if it and its ancestors will not notice."""
    adopts = any(part.image.resources["identity"].child_subreaper for part in parts)
    obstacle = find_obstacle(frozen, adopts_orphans=adopts)
    cloned = None if obstacle else twins.enter_context(twin(lent, frozen))
    if cloned is None:
        work.obstacle = obstacle or "the kernel refused to clone it"
    return cloned


def _host_facts(work: _Work) -> dict[str, object]:
    """Return what a restore, a user or the next dump may want to know of where this was made."""
    root = work.members.by_pid[work.root].tracking
    return {
        "pid": work.root,
        "exec_id": root.exec_id,
        "boot_id": root.process.boot_id,
        "start_ticks": root.process.start_ticks,
        "kernel_release": work.features.kernel_release,
        "machine": work.features.machine,
        "xsave_bytes": work.features.xsave_bytes,
        "hostname": os.uname().nodename,
    }


def _kill(tree: FrozenTree) -> None:
    """End the target where it stands; it does not run another instruction."""
    # The deepest first: no parent is told of the end of a child.
    for frozen in reversed(tree.processes.values()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(frozen.pid, signal.SIGKILL)
    for frozen in reversed(tree.processes.values()):
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
