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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from ckpt.engine.fill import fill
from ckpt.engine.guard import Lazy, Server, start_server, watching
from ckpt.engine.identity import read_exec_id
from ckpt.engine.layout import choose_arena, number_inherited, spans_of
from ckpt.engine.lazy import plan_lazy
from ckpt.engine.pages import own_mappings
from ckpt.engine.records import ProcessImage, ThreadImage, decode_processes
from ckpt.engine.tracking import drop_epoch, tracking
from ckpt.errors import (
    CkptError,
    FeatureMissing,
    FileChanged,
    HostFull,
    HostMismatch,
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
from ckpt.resources.base import Opened, Rebuilt, Resource, RestoreOptions, Stage
from ckpt.resources.registry import PROCESS, THREAD, clock_offsets, highest_fd
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
class _Work:
    """One restore under way."""

    process: ProcessImage
    reader: PageReader
    features: Features
    inherited: dict[str, RemoteFd]
    warn: Callable[[str], None]
    at_once: ResolvedRuns
    """What is filled before the process runs."""
    lazy: Lazy | None
    """What is filled while it runs."""
    server: Server | None = None


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
    reader, process, content = _verify(chain, number, ahead, lazy=lazy)
    features = probe_features()
    _check_host(process, features, options)
    with _opened(process, options) as opened:
        work = _Work(process, reader, features, {}, warnings.append, *content)
        try:
            _rebuild(work, opened, chain.chain_id)
        finally:
            if work.server is not None:
                work.server.close()
    restore_ms = (time.monotonic() - started_s) * 1000
    return RestoreResult(process.pid, number, restore_ms, tuple(warnings))


def _number(chain: Chain, at: int | None) -> GenerationNo:
    number = chain.newest() if at is None else GenerationNo(at)
    if number is None:
        raise NoGeneration(str(chain.path), GenerationNo(0), "none yet")
    return number


def _verify(
    chain: Chain, number: GenerationNo, ahead: Ahead | None, *, lazy: bool
) -> tuple[PageReader, ProcessImage, tuple[ResolvedRuns, Lazy | None]]:
    """Check what is used before the process runs; return what is filled then, and what later."""
    path = str(chain.manifest_path(number))
    n_threads = count_free_threads()
    if ahead is not None:
        process = decode_processes(ahead.reader.manifest, path)[0]
        reader = ahead.finish()
        return reader, process, (reader.resolve(process.space), None)
    if not lazy:
        reader = verify_for(chain, number, threads=n_threads)
        process = decode_processes(reader.manifest, path)[0]
        return reader, process, (reader.resolve(process.space), None)
    reader = PageReader(chain, number, threads=n_threads)
    process = decode_processes(reader.manifest, path)[0]
    runs = reader.resolve(process.space)
    spans, others = plan_lazy(process.resources["memory"].vmas, runs)
    at_once = runs.clip(others)
    verify_sizes(chain, number)
    verify_frames(chain, reader, [at_once], threads=n_threads)
    if not spans:
        return reader, process, (at_once, None)
    image = f"generation {number} of {chain.path}"
    return reader, process, (at_once, Lazy(reader, runs.clip(spans), spans, image))


def _iter_records(process: ProcessImage) -> Iterator[tuple[Resource[Any], Any]]:
    for resource in PROCESS:
        yield resource, process.resources[resource.name]
    for thread in process.threads:
        for resource in THREAD:
            yield resource, thread.resources[resource.name]


def _check_host(process: ProcessImage, features: Features, options: RestoreOptions) -> None:
    """Refuse a host on which the process would not be what it was; all findings together."""
    for thread in process.threads:
        if os.path.exists(f"/proc/{thread.tid}"):
            raise taken(thread.tid)
    records = list(_iter_records(process))
    # Threads have many in common.
    host = dict.fromkeys(
        f for resource, record in records for f in resource.check_host(record, features)
    )
    if host:
        raise HostMismatch(tuple(host))
    files = [f for resource, record in records for f in resource.check_files(record, options)]
    if files:
        raise FileChanged(tuple(files))


@contextlib.contextmanager
def _opened(process: ProcessImage, options: RestoreOptions) -> Iterator[dict[str, Opened]]:
    """Open everything that the embryo inherits; ours are closed again on the way out."""
    opened: dict[str, Opened] = {}
    try:
        for resource, record in _iter_records(process):
            opened |= resource.prepare(record, options)
        yield opened
    finally:
        for one in opened.values():
            os.close(one.fd)


def _rebuild(work: _Work, opened: dict[str, Opened], chain_id: str) -> None:
    """Make the process and let it go; whatever fails before that leaves nothing behind."""
    process = work.process
    memory = process.resources["memory"]
    fds, work.inherited = number_inherited(opened, highest_fd(process.resources))
    arena_at = choose_arena(spans_of(vma.span for vma in memory.vmas))
    offsets = clock_offsets(process.resources)
    with plant(process.pid, fds, offsets, arena_at) as embryo:
        for stage in (Stage.MEMORY, Stage.FILES, Stage.PROCESS):
            _restore_process(work, embryo, stage)
        _make_threads(process, embryo)
        _restore_threads(work, embryo, Stage.THREAD)
        for stage in (Stage.LATE, Stage.CREDENTIALS):
            _restore_process(work, embryo, stage)
            _restore_threads(work, embryo, stage)
        _arm_and_let_go(work, embryo, chain_id)


def _restore_process(work: _Work, embryo: Embryo, stage: Stage) -> None:
    resources = (resource for resource in PROCESS if resource.stage is stage)
    for resource in resources:
        record = work.process.resources[resource.name]
        _run_restore(work, embryo, embryo.leader, resource, record)


def _restore_threads(work: _Work, embryo: Embryo, stage: Stage) -> None:
    resources = [resource for resource in THREAD if resource.stage is stage]
    for thread in work.process.threads:
        task = embryo.tasks[thread.tid]
        for resource in resources:
            _run_restore(work, embryo, task, resource, thread.resources[resource.name])


def _run_restore(
    work: _Work, embryo: Embryo, task: Task, resource: Resource[Any], record: object
) -> None:
    """Drive one resource's generator: run what it yields, send the replies."""
    rebuilt = Rebuilt(
        embryo=embryo,
        task=task,
        features=work.features,
        inherited=work.inherited,
        fill=lambda: _fill(work, embryo),
        warn=work.warn,
    )
    restoring = resource.restore(record, rebuilt)
    with contextlib.suppress(StopIteration):
        calls = next(restoring)
        while True:
            calls = restoring.send(embryo.run(calls, task) if calls else [])


def _fill(work: _Work, embryo: Embryo) -> None:
    """Write the stored pages into the mapped embryo."""
    vmas = work.process.resources["memory"].vmas
    if work.lazy is None:
        fill(embryo, work.reader, work.at_once, vmas)
        return
    with watching(work.lazy, embryo) as fd:
        fill(embryo, work.reader, work.at_once, vmas)
        work.server = start_server(work.lazy, embryo.pid, fd)


def _make_threads(process: ProcessImage, embryo: Embryo) -> None:
    """Make all threads but the leader, each with its id; none of them runs."""
    others = [thread for thread in process.threads if thread.tid != Tid(process.pid)]
    if not others:
        return
    replies = embryo.run([_clone(thread) for thread in others])
    for thread, reply in zip(others, replies, strict=True):
        if reply.error == errno.EEXIST:
            raise taken(thread.tid)
        if not reply.ok:
            raise RestoreFailed(f"making thread {thread.tid}", str(reply))
    for tid in embryo.leader.made:
        embryo.tasks[tid] = adopt(tid)


def _clone(thread: ThreadImage) -> Call:
    raw = pack_clone_args(flags=_THREAD_FLAGS, n_set_tid=1)
    pointer = (clone_args.set_tid.offset, pack_set_tid([thread.tid]))
    return call(NR.clone3, In(raw, (pointer,)), len(raw))


def _arm_and_let_go(work: _Work, embryo: Embryo, chain_id: str) -> None:
    """Arm the tracker, take our arena away, and let all threads run.

    That the tracker cannot be armed does not stop a restore: the next dump is then full.
    """
    manifest = work.reader.manifest
    old = read_epoch(embryo.pid)
    if old is not None:
        drop_epoch(old)
    if work.server is not None:
        # A mapping has one userfaultfd, and the server's is needed until all pages are there.
        work.warn("the next incremental dump will be full: the restore is lazy")
        _unmap_arena(embryo)
        _let_go(work.process, embryo)
        work.server.start()
        return
    name = _tracker_name(manifest, work.features)
    identity, exec_id = read_identity(embryo.pid), read_exec_id(embryo.pid)
    with tracking(identity, exec_id, name, work.features) as lent:
        armed = _succeeds(work, lambda: lent.attach(embryo.arena, embryo.leader))
        _unmap_arena(embryo)
        if armed:
            lent.collect(own_mappings(work.process.resources["memory"]), [])
            _succeeds(work, lambda: lent.advance(chain_id, manifest.generation, manifest.digest))
        _let_go(work.process, embryo)


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


def _let_go(process: ProcessImage, embryo: Embryo) -> None:
    """Give every thread its own state; then none fails any more, and all run."""
    for task in embryo.tasks.values():
        task.disturbed = True
        task.put_back()
    if process.stopped_by or any(task.deferred_stop for task in embryo.tasks.values()):
        os.kill(process.pid, signal.SIGSTOP)
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
