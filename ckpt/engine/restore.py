"""A restore, from start to end.

verify        structure, digests, and every checksum of what will be used
check         this host: pids, files, clocks; everything that is wrong is named together
open          files, by us, to be inherited
plant         the seed makes the embryo, with the pid of the image
  memory      its address space becomes that of the image, pages are filled
  resources   stage by stage (`resources.base.Stage`)
  threads     made with their ids, then each one's own state
  tracker     armed, so that the next dump can be a delta on this generation
let go        all threads together; until here any failure leaves nothing behind
"""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from ckpt.engine.content_files import Contents
from ckpt.engine.fill import fill
from ckpt.engine.growing import Growing
from ckpt.engine.guard import Lazy, Server, start_server, watching
from ckpt.engine.identity import read_exec_id
from ckpt.engine.layout import choose_arena, number_inherited, spans_of
from ckpt.engine.lazy import plan_lazy
from ckpt.engine.pages import own_mappings
from ckpt.engine.preparing import Files, check_host, opened
from ckpt.engine.rebuilding import in_order, run_in_rounds
from ckpt.engine.records import ProcessImage, ThreadImage, TreeImage, decode_tree
from ckpt.engine.tracking import drop_epoch, tracking
from ckpt.errors import (
    CkptError,
    FeatureMissing,
    HostFull,
    NoGeneration,
    NotPermitted,
    RestoreFailed,
    TargetGone,
)
from ckpt.image.ahead import Ahead
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest
from ckpt.image.reader import PageReader
from ckpt.image.runs import ResolvedRuns
from ckpt.image.verify import verify_for, verify_frames, verify_sizes
from ckpt.image.workers import count_free_threads
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.clone3 import CloneFlag, clone_args, pack_clone_args, pack_set_tid
from ckpt.kernel.features import Features, probe_features
from ckpt.process.arena import ARENA_SIZE
from ckpt.process.holder import taken
from ckpt.process.remote import Call, In, call
from ckpt.process.seed import Embryo, adopt, plant, see_off
from ckpt.process.task import Task
from ckpt.process.tree import read_identity
from ckpt.resources.base import Rebuilt, Resource, RestoreOptions, Stage
from ckpt.resources.content import CONTENTS, ContentRecord
from ckpt.resources.registry import PROCESS, THREAD, clock_offsets, entered, highest_fd
from ckpt.tracker.base import TrackerName
from ckpt.tracker.choose import choose_tracker
from ckpt.tracker.epoch import read_epoch
from ckpt.units import GenerationNo, Pid, RemoteFd, Tid

_THREAD_FLAGS = (
    CloneFlag.VM
    | CloneFlag.FS
    | CloneFlag.FILES
    | CloneFlag.SIGHAND
    | CloneFlag.THREAD
    | CloneFlag.SYSVSEM
)


@attrs.frozen
class RestoreResult:
    """What a restore brought back; the process runs."""

    pid: Pid
    generation: GenerationNo
    restore_ms: float
    """From the start of the call until all threads were let go."""
    warnings: tuple[str, ...]


@attrs.define(repr=False)
class _Part:
    """One process of a restore under way."""

    image: ProcessImage
    at_once: ResolvedRuns
    """What is filled before it runs."""
    lazy: Lazy | None = None
    """What is filled while it runs."""
    inherited: dict[str, RemoteFd] = attrs.Factory(dict)
    embryo: Embryo = attrs.field(init=False)


@attrs.define(repr=False)
class _Work:
    """One restore under way."""

    tree: TreeImage
    parts: dict[Pid, _Part]
    reader: PageReader
    features: Features
    warn: Callable[[str], None]
    contents: Contents
    """Files that the image holds the content of."""
    servers: list[Server] = attrs.Factory(list)


def restore(
    directory: str | Path,
    at: int | None = None,
    options: RestoreOptions | None = None,
    *,
    lazy: bool = False,
    ahead: Ahead | None = None,
) -> RestoreResult:
    """Bring a process back from a generation of an image directory (the newest by default).

    It is a child of the caller and runs when this returns. Its next incremental dump into the same
    directory is a delta on that generation. With `lazy` it runs before its memory is there: two
    processes of ours fill it, check each page then, and end when all is there; the next dump is
    full, and refused until then.

    Args:
        directory: of the chain.
        at: the generation.
        options: what the user of a restore may choose.
        lazy: see above.
        ahead: of the same generation, begun before; not with `lazy`.

    Raises:
        ImageError: the image is damaged, of a newer format, or has no such generation.
        RestoreError: this host cannot run it as it was; nothing was left behind.
        HostError: the kernel or the user lacks something.
    """
    started_s = time.monotonic()
    warnings: list[str] = []
    options = options or RestoreOptions()
    options = attrs.evolve(options, warn=warnings.append)
    chain = Chain.open(Path(directory))
    number = _number(chain, at)
    reader, tree, parts = _verify(chain, number, ahead, lazy=lazy)
    features = probe_features()
    with Contents(_records_of_contents(tree)) as contents:
        options = attrs.evolve(options, contents=contents.paths)
        work = _Work(tree, parts, reader, features, warnings.append, contents)
        # What the root has of its own (host name, IPC, network) is made by us, and inherited.
        with entered(tree.root.resources):
            check_host(tree, features, options)
            if lazy:
                verify_frames(chain, reader, contents.resolve(reader))
            contents.fill(reader)
            _build(work, options, chain.chain_id)
    restore_ms = (time.monotonic() - started_s) * 1000
    return RestoreResult(tree.root.pid, number, restore_ms, tuple(warnings))


def _build(work: _Work, options: RestoreOptions, chain_id: str) -> None:
    """Open the files, make the tree, let it go."""
    with opened(work.tree, options) as files:
        try:
            _rebuild(work, files, chain_id)
        finally:
            for server in work.servers:
                server.close()


def _records_of_contents(tree: TreeImage) -> list[ContentRecord]:
    return [
        record for process in tree.processes for record in process.resources[CONTENTS.name].contents
    ]


def _number(chain: Chain, at: int | None) -> GenerationNo:
    number = chain.newest() if at is None else GenerationNo(at)
    if number is None:
        raise NoGeneration(str(chain.path), GenerationNo(0), "none yet")
    return number


def _verify(
    chain: Chain, number: GenerationNo, ahead: Ahead | None, *, lazy: bool
) -> tuple[PageReader, TreeImage, dict[Pid, _Part]]:
    """Check what is used before the tree runs; return what is filled then, and what later."""
    path = str(chain.manifest_path(number))
    n_threads = count_free_threads()
    if lazy:
        reader = PageReader(chain, number, threads=n_threads)
        tree = decode_tree(reader.manifest, path)
        image = f"generation {number} of {chain.path}"
        parts = {process.pid: _plan_lazy(process, reader, image) for process in tree.processes}
        verify_sizes(chain, number)
        verify_frames(chain, reader, [part.at_once for part in parts.values()], threads=n_threads)
        return reader, tree, parts
    if ahead is not None:
        tree = decode_tree(ahead.reader.manifest, path)
        reader = ahead.finish()
    else:
        reader = verify_for(chain, number, threads=n_threads)
        tree = decode_tree(reader.manifest, path)
    parts = {one.pid: _Part(one, reader.resolve(one.space)) for one in tree.processes}
    return reader, tree, parts


def _plan_lazy(process: ProcessImage, reader: PageReader, image: str) -> _Part:
    runs = reader.resolve(process.space)
    spans, others = plan_lazy(process.resources["memory"].vmas, runs)
    if not spans:
        return _Part(process, runs.clip(others))
    return _Part(process, runs.clip(others), Lazy(reader, runs.clip(spans), spans, image))


def _rebuild(work: _Work, files: Files, chain_id: str) -> None:
    """Make the tree and let it go; whatever fails before that leaves nothing behind."""
    fds, numbers = number_inherited(
        files.by_key, highest_fd(process.resources for process in work.tree.processes)
    )
    for pid, part in work.parts.items():
        part.inherited = files.of_process(pid, numbers)
    root = work.tree.root
    arena_at = choose_arena(
        spans_of(vma.span for one in work.tree.processes for vma in one.resources["memory"].vmas)
    )
    offsets = clock_offsets(root.resources)
    with plant(root.pid, fds, offsets, arena_at) as nursery:
        Growing(
            work.tree, nursery, partial(_give_memory, work), partial(_give_terminal, work)
        ).grow()
        parts = work.parts.values()
        for stage in (Stage.FILES, Stage.PROCESS):
            for part in parts:
                _restore_process(work, part, stage)
        for part in parts:
            _make_threads(part)
        for part in parts:
            _restore_threads(work, part, Stage.THREAD)
        for stage in (Stage.LATE, Stage.CREDENTIALS):
            for part in parts:
                _restore_process(work, part, stage)
                _restore_threads(work, part, stage)
        files.run_at_last()
        work.contents.finish()
        _arm_and_let_go(work, chain_id)


def _give_memory(work: _Work, image: ProcessImage, embryo: Embryo) -> None:
    part = work.parts[image.pid]
    part.embryo = embryo
    _restore_process(work, part, Stage.MEMORY)


def _give_terminal(work: _Work, image: ProcessImage) -> None:
    _restore_process(work, work.parts[image.pid], Stage.SESSION)


def _restore_process(work: _Work, part: _Part, stage: Stage) -> None:
    resources = (resource for resource in PROCESS if resource.stage is stage)
    for resource in resources:
        record = part.image.resources[resource.name]
        _run_restore(work, part, part.embryo.leader, resource, record)


def _restore_threads(work: _Work, part: _Part, stage: Stage) -> None:
    resources = [resource for resource in THREAD if resource.stage is stage]
    restores = []
    for thread in part.image.threads:
        rebuilt = _rebuilt(work, part, part.embryo.tasks[thread.tid])
        each = [one.restore(thread.resources[one.name], rebuilt) for one in resources]
        restores.append((rebuilt.task, in_order(each)))
    run_in_rounds(part.embryo, restores)


def _run_restore(
    work: _Work, part: _Part, task: Task, resource: Resource[Any], record: object
) -> None:
    """Drive one resource's generator: run what it yields, send the replies."""
    restoring = resource.restore(record, _rebuilt(work, part, task))
    with contextlib.suppress(StopIteration):
        calls = next(restoring)
        while True:
            calls = restoring.send(part.embryo.run(calls, task) if calls else [])


def _rebuilt(work: _Work, part: _Part, task: Task) -> Rebuilt:
    return Rebuilt(
        embryo=part.embryo,
        task=task,
        features=work.features,
        inherited=part.inherited,
        fill=lambda: _fill(work, part),
        warn=work.warn,
    )


def _fill(work: _Work, part: _Part) -> None:
    """Write the stored pages into the mapped embryo."""
    vmas = part.image.resources["memory"].vmas
    if part.lazy is None:
        fill(part.embryo, work.reader, part.at_once, vmas)
        return
    with watching(part.lazy, part.embryo) as fd:
        fill(part.embryo, work.reader, part.at_once, vmas)
        work.servers.append(start_server(part.lazy, part.embryo.pid, fd))


def _make_threads(part: _Part) -> None:
    """Make all threads but the leader, each with its id; none of them runs."""
    process, embryo = part.image, part.embryo
    others = [thread for thread in process.threads if thread.tid != Tid(process.pid)]
    if not others:
        return
    replies = embryo.run([_clone(thread) for thread in others])
    for thread, reply in zip(others, replies, strict=True):
        if reply.error == errno.EEXIST:
            raise taken(thread.tid)
        if not reply.ok:
            raise RestoreFailed(f"making thread {thread.tid}", str(reply))
    for thread in others:
        embryo.tasks[thread.tid] = adopt(thread.tid)


def _clone(thread: ThreadImage) -> Call:
    raw = pack_clone_args(flags=_THREAD_FLAGS, n_set_tid=1)
    pointer = (clone_args.set_tid.offset, pack_set_tid([thread.tid]))
    return call(NR.clone3, In(raw, (pointer,)), len(raw))


def _arm_and_let_go(work: _Work, chain_id: str) -> None:
    """Arm the trackers, take our arenas away, and let all threads run.

    That a tracker cannot be armed does not stop a restore: the next dump is then full.
    """
    with contextlib.ExitStack() as stack:
        if work.servers:
            # A mapping has one userfaultfd, and the server's is needed until all pages are there.
            work.warn("the next incremental dump will be full: the restore is lazy")
        for part in work.parts.values():
            old = read_epoch(part.embryo.pid)
            if old is not None:
                drop_epoch(old)
            if work.servers:
                _unmap_arena(part.embryo)
            else:
                _arm(work, part, chain_id, stack)
        _let_go(list(work.parts.values()))
    for server in work.servers:
        server.start()


def _arm(work: _Work, part: _Part, chain_id: str, stack: contextlib.ExitStack) -> None:
    """Arm the tracker of one process against what it comes from; its arena is gone then."""
    manifest, embryo = work.reader.manifest, part.embryo
    name = _tracker_name(manifest, work.features)
    identity, exec_id = read_identity(embryo.pid), read_exec_id(embryo.pid)
    lent = stack.enter_context(tracking(identity, exec_id, name, work.features))
    armed = _succeeds(work, lambda: lent.attach(embryo.arena, embryo.leader))
    _unmap_arena(embryo)
    if armed:
        lent.collect(own_mappings(part.image.resources["memory"]), [])
        _succeeds(work, lambda: lent.advance(chain_id, manifest.generation, manifest.digest))


def _succeeds(work: _Work, step: Callable[[], None]) -> bool:
    """Do something that only the next delta needs; warn if this host or the process cannot."""
    try:
        step()
    except (FeatureMissing, NotPermitted, HostFull) as error:
        work.warn(f"the next incremental dump will be full: {error}")
        return False
    return True


def _tracker_name(manifest: Manifest, features: Features) -> TrackerName:
    """Use the tracker of the image, so that the next delta continues it, or what works here."""
    try:
        return choose_tracker(manifest.tracker, features)
    except (CkptError, ValueError):
        return choose_tracker("auto", features)


def _unmap_arena(embryo: Embryo) -> None:
    """Take the arena away by its own last instruction: the stop comes before the next is read."""
    arena = embryo.arena
    reply = embryo.leader.run_single(arena.insn, NR.munmap, arena.base, ARENA_SIZE)
    if not reply.ok:
        raise RestoreFailed("removing the arena", str(reply))


def _let_go(parts: list[_Part]) -> None:
    """Give every thread its own state; then none fails any more, and all run."""
    for part in parts:
        tasks = part.embryo.tasks.values()
        for task in tasks:
            task.disturbed = True
            task.put_back()
        if part.image.stopped_by or any(task.deferred_stop for task in tasks):
            os.kill(part.embryo.pid, signal.SIGSTOP)
    for part in parts:
        _detach(part.embryo)


def _detach(embryo: Embryo) -> None:
    # The leader last: it can be waited for only when the other threads have been.
    for task in reversed(embryo.tasks.values()):
        try:
            ptrace.detach(task.tid)
        except TargetGone:
            # Those that run already have ended the process. How it ended, the leader tells.
            if task is not embryo.leader:
                see_off(task.tid)


def wait_for_end(pid: Pid) -> int:
    """Wait for a restored process; return its exit status as a shell does (128 + signal)."""
    forwarded = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _forward_to(pid)) for number in forwarded}
    # A terminal sends SIGINT and SIGQUIT to the restored process itself: it decides.
    before |= {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGQUIT)}
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _forward_to(pid: Pid) -> Callable[[int, object], None]:
    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    return forward
