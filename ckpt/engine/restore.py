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
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from ckpt.engine.building import Building, Part
from ckpt.engine.content_files import Contents
from ckpt.engine.guard import Lazy
from ckpt.engine.identity import read_exec_id
from ckpt.engine.layout import choose_arena, number_inherited, spans_of
from ckpt.engine.lazy import plan_lazy
from ckpt.engine.pages import own_mappings
from ckpt.engine.preparing import check_host, opened
from ckpt.engine.records import ProcessImage, TreeImage, decode_tree
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
from ckpt.image.verify import verify_for, verify_frames, verify_sizes
from ckpt.image.workers import count_free_threads
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features, probe_features
from ckpt.process.arena import ARENA_SIZE
from ckpt.process.seed import Embryo, plant, see_off
from ckpt.process.tree import read_identity
from ckpt.resources.base import RestoreOptions
from ckpt.resources.content import CONTENTS, ContentRecord
from ckpt.resources.registry import clock_offsets, entered, highest_fd
from ckpt.tracker.base import TrackerName
from ckpt.tracker.choose import choose_tracker
from ckpt.tracker.epoch import read_epoch
from ckpt.units import GenerationNo, Pid


@attrs.frozen
class RestoreResult:
    """What a restore brought back; the process runs."""

    pid: Pid
    generation: GenerationNo
    restore_ms: float
    """From the start of the call until all threads were let go."""
    warnings: tuple[str, ...]


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
        building = Building(tree, parts, reader, features, warnings.append)
        # What the root has of its own (host name, IPC, network) is made by us, and inherited.
        with entered(tree.root.resources):
            check_host(tree, features, options)
            if lazy:
                verify_frames(chain, reader, contents.resolve(reader))
            contents.fill(reader)
            _build(building, contents, options, chain.chain_id)
    restore_ms = (time.monotonic() - started_s) * 1000
    return RestoreResult(tree.root.pid, number, restore_ms, tuple(warnings))


def _build(building: Building, contents: Contents, options: RestoreOptions, chain_id: str) -> None:
    """Open the files, make the tree, let it go; what fails before that leaves nothing behind."""
    tree = building.tree
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(opened(tree, options))
        stack.callback(_close_servers, building)
        fds, numbers = number_inherited(
            files.by_key, highest_fd(process.resources for process in tree.processes)
        )
        for pid, part in building.parts.items():
            part.inherited = files.of_process(pid, numbers)
        arena_at = choose_arena(
            spans_of(vma.span for one in tree.processes for vma in one.resources["memory"].vmas)
        )
        offsets = clock_offsets(tree.root.resources)
        with plant(tree.root.pid, fds, offsets, arena_at) as nursery:
            building.build(nursery)
            files.run_at_last()
            contents.finish()
            _arm_and_let_go(building, chain_id)


def _close_servers(building: Building) -> None:
    for server in building.servers:
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
) -> tuple[PageReader, TreeImage, dict[Pid, Part]]:
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
    parts = {one.pid: Part(one, reader.resolve(one.space)) for one in tree.processes}
    return reader, tree, parts


def _plan_lazy(process: ProcessImage, reader: PageReader, image: str) -> Part:
    runs = reader.resolve(process.space)
    spans, others = plan_lazy(process.resources["memory"].vmas, runs)
    if not spans:
        return Part(process, runs.clip(others))
    return Part(process, runs.clip(others), Lazy(reader, runs.clip(spans), spans, image))


def _arm_and_let_go(building: Building, chain_id: str) -> None:
    """Arm the trackers, take our arenas away, and let all threads run.

    That a tracker cannot be armed does not stop a restore: the next dump is then full.
    """
    with contextlib.ExitStack() as stack:
        if building.servers:
            # A mapping has one userfaultfd, and the server's is needed until all pages are there.
            building.warn("the next incremental dump will be full: the restore is lazy")
        for part in building.parts.values():
            old = read_epoch(part.embryo.pid)
            if old is not None:
                drop_epoch(old)
            if building.servers:
                _unmap_arena(part.embryo)
            else:
                _arm(building, part, chain_id, stack)
        _let_go(list(building.parts.values()))
    for server in building.servers:
        server.start()


def _arm(building: Building, part: Part, chain_id: str, stack: contextlib.ExitStack) -> None:
    """Arm the tracker of one process against what it comes from; its arena is gone then."""
    manifest, embryo = building.reader.manifest, part.embryo
    name = _tracker_name(manifest, building.features)
    identity, exec_id = read_identity(embryo.pid), read_exec_id(embryo.pid)
    lent = stack.enter_context(tracking(identity, exec_id, name, building.features))
    armed = _succeeds(building, lambda: lent.attach(embryo.arena, embryo.leader))
    _unmap_arena(embryo)
    if armed:
        lent.collect(own_mappings(part.image.resources["memory"]), [])
        _succeeds(building, lambda: lent.advance(chain_id, manifest.generation, manifest.digest))


def _succeeds(building: Building, step: Callable[[], None]) -> bool:
    """Do something that only the next delta needs; warn if this host or the process cannot."""
    try:
        step()
    except (FeatureMissing, NotPermitted, HostFull) as error:
        building.warn(f"the next incremental dump will be full: {error}")
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


def _let_go(parts: list[Part]) -> None:
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
