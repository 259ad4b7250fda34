"""Building the processes of a tree, from embryos that were planted to the point of letting go.

born          each by its parent, in its session and group (`growing`); with its memory, filled
resources     stage by stage (`resources.base.Stage`)
threads       made with their ids, then each one's own state

Everything here is done to processes that die with us. Neighbours: `preparing` opened the files that
they inherit, `restore` and migration let them go.
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from ckpt import fault
from ckpt.engine.fill import fill
from ckpt.engine.growing import Growing, end_leader
from ckpt.engine.guard import Lazy, Server, start_server, watching
from ckpt.engine.inheriting import NOTHING, Inheritance, inheritance, plan_fill, stored_pages
from ckpt.engine.prefilling import Prefilled
from ckpt.engine.rebuilding import Rebuilding, in_order, run_in_rounds
from ckpt.engine.records import ProcessImage, ThreadImage, TreeImage
from ckpt.errors import RestoreFailed
from ckpt.image.reader import PageReader
from ckpt.image.runs import ResolvedRuns
from ckpt.kernel.arch import NR
from ckpt.kernel.clone3 import CloneFlag, clone_args, pack_clone_args, pack_set_tid
from ckpt.kernel.features import Features
from ckpt.process.holder import taken
from ckpt.process.remote import Call, In, call
from ckpt.process.seed import Embryo, Nursery, adopt
from ckpt.process.task import Task
from ckpt.resources.base import Rebuilt, Resource, Restore, Stage, nothing_more
from ckpt.resources.mapping_calls import drop
from ckpt.resources.memory import MEMORY
from ckpt.resources.registry import PROCESS, THREAD
from ckpt.tracker.populated import iter_ranges
from ckpt.tracker.spans import Spans, total_bytes
from ckpt.units import Pid, RemoteFd, Tid

_THREAD_FLAGS = (
    CloneFlag.VM
    | CloneFlag.FS
    | CloneFlag.FILES
    | CloneFlag.SIGHAND
    | CloneFlag.THREAD
    | CloneFlag.SYSVSEM
)


@attrs.define(repr=False)
class Part:
    """One process under construction."""

    image: ProcessImage
    at_once: ResolvedRuns
    """What is filled before it runs; what is there of one that is prefilled may not be in it."""
    lazy: Lazy | None = None
    """What is filled while it runs."""
    inherited: Mapping[str, RemoteFd] = attrs.Factory(dict)
    inheritance: Inheritance = NOTHING
    """What it has of its maker's memory when it is born."""
    prefilled: Prefilled | None = None
    """What is there of its memory already."""
    wanted: Spans = attrs.Factory(lambda self: stored_pages(self.at_once), takes_self=True)
    """All pages that have content before it runs."""
    embryo: Embryo = attrs.field(init=False)


def part_at_once(process: ProcessImage, reader: PageReader) -> Part:
    """Return the part of a process all of whose memory is filled before it runs."""
    runs = reader.resolve(process.space)
    # What it has of another one is filled there.
    return Part(process, runs if process.has_memory else runs.clip([]))


@attrs.define(repr=False)
class Building:
    """A tree under construction."""

    tree: TreeImage
    parts: dict[Pid, Part]
    reader: PageReader
    features: Features
    warn: Callable[[str], None]
    servers: list[Server] = attrs.Factory(list)
    seen_as: Mapping[int, Pid] = attrs.Factory(dict)
    """See `Rebuilt.seen_as`."""
    ahead_bytes: int = 0
    """Of the memory that is filled at once: what was there before, or is a parent's."""
    late_bytes: int = 0
    """The rest of it, which `build` has filled."""

    def build(self, nursery: Nursery) -> None:
        """Make all processes and threads, and give each its state; only our arenas are left.

        State: what they inherit is open in the root's embryo; `Part.inherited` says where.

        Raises:
            PidTaken: a number is in use.
            RestoreFailed: the kernel refused something.
        """
        self.seen_as = nursery.seen_as
        Growing(self.tree, nursery).grow(self._give_memory, self._give_terminal)
        fault.reach("restore-born")
        parts = list(self.parts.values())
        run_in_rounds(map(self._finish, parts))
        fault.reach("restore-finished")
        self._restore_processes(parts, Stage.FILES)
        fault.reach("restore-files")
        self._restore_processes(parts, Stage.PROCESS)
        fault.reach("restore-processes")
        _make_threads(parts)
        fault.reach("restore-threads")
        self._restore_threads(parts, Stage.THREAD)
        fault.reach("restore-states")
        self._restore_processes(parts, Stage.LATE)
        self._restore_threads(parts, Stage.LATE)
        fault.reach("restore-late")
        # Before its children get signals for the end of the thread that has made them.
        for part in parts:
            end_leader(part.image, part.embryo)
        self._restore_processes(parts, Stage.CREDENTIALS)
        self._restore_threads(parts, Stage.CREDENTIALS)
        fault.reach("restore-credentials")

    def _give_memory(self, born: Sequence[tuple[ProcessImage, Embryo]]) -> None:
        parts = [self.parts[image.pid] for image, _ in born]
        for part, (image, embryo) in zip(parts, born, strict=True):
            part.embryo = embryo
            if part.prefilled:
                part.prefilled.embryo = embryo
                part.prefilled.rescue(image.resources["memory"], part.wanted)
            maker = self.parts.get(embryo.maker) if embryo.maker else None
            # What is filled only later is nothing yet that a child could keep.
            if maker and maker.image.owns(MEMORY) and not (part.lazy or maker.lazy):
                memory = maker.image.resources["memory"]
                part.inheritance = inheritance(memory, maker.at_once, maker.wanted)
        self._restore_processes(parts, Stage.MEMORY)
        fault.reach("restore-mapped")
        for _, embryo in born:
            embryo.has_memory = True

    def _give_terminal(self, image: ProcessImage) -> None:
        self._restore_processes([self.parts[image.pid]], Stage.SESSION)

    def _restore_processes(self, parts: Sequence[Part], stage: Stage) -> None:
        resources = [resource for resource in PROCESS if resource.stage is stage]
        run_in_rounds([self._restore_process(part, resources) for part in parts])

    def _restore_process(self, part: Part, resources: Sequence[Resource[Any]]) -> Rebuilding:
        rebuilt = self._rebuilt(part, part.embryo.leader)
        each = [
            resource.restore(part.image.resources[resource.name], rebuilt)
            for resource in filter(part.image.owns, resources)
        ]
        return _rebuilding(part, rebuilt.task, each)

    def _finish(self, part: Part) -> Rebuilding:
        rebuilt = self._rebuilt(part, part.embryo.leader)
        each = [
            resource.finish(part.image.resources[resource.name], rebuilt)
            for resource in filter(part.image.owns, PROCESS)
            # Most have nothing to finish, and need not be asked.
            if resource.finish is not nothing_more
        ]
        return _rebuilding(part, rebuilt.task, each)

    def _restore_threads(self, parts: Sequence[Part], stage: Stage) -> None:
        resources = [resource for resource in THREAD if resource.stage is stage]
        restores = []
        for part in parts:
            for thread in part.image.threads:
                rebuilt = self._rebuilt(part, part.embryo.tasks[thread.tid])
                each = [one.restore(thread.resources[one.name], rebuilt) for one in resources]
                restores.append(_rebuilding(part, rebuilt.task, each))
        run_in_rounds(restores)

    def _rebuilt(self, part: Part, task: Task) -> Rebuilt:
        return Rebuilt(
            embryo=part.embryo,
            task=task,
            features=self.features,
            inherited=part.inherited,
            fill=lambda keep: self._fill(part, keep),
            warn=self.warn,
            mapped=(part.prefilled or part.inheritance).mapped,
            seen_as=self.seen_as,
        )

    def _fill(self, part: Part, keep: Spans) -> None:
        """Write the stored pages into the mapped embryo, but for what is there already."""
        embryo, vmas = part.embryo, part.image.resources["memory"].vmas
        if part.lazy is None:
            pages = (
                part.prefilled.plan_rest(part.wanted, keep)
                if part.prefilled
                else plan_fill(part.at_once, part.wanted, keep, part.inheritance)
            )
            all_bytes = total_bytes(part.wanted)
            if pages is None:
                self.late_bytes += all_bytes
                fill(embryo, self.reader, part.at_once, vmas)
                return
            late_bytes = total_bytes(pages.write)
            self.late_bytes += late_bytes
            self.ahead_bytes += all_bytes - late_bytes
            if pages.drop:
                embryo.run_checked("dropping memory", [drop(*span) for span in pages.drop])
            rest = part.at_once.clip(iter_ranges(pages.write))
            if total_bytes(stored_pages(rest)) < late_bytes:
                raise RestoreFailed("filling memory", "pages of it are nowhere")
            fill(embryo, self.reader, rest, vmas, pages.over)
            if part.prefilled:
                part.prefilled.put_back()
            return
        with watching(part.lazy, embryo) as fd:
            fill(embryo, self.reader, part.at_once, vmas)
            self.servers.append(start_server(part.lazy, embryo.pid, fd))


def _rebuilding(part: Part, task: Task, each: Sequence[Restore]) -> Rebuilding:
    """Return what is restored of a thread, one after the other."""
    image = part.image
    return Rebuilding(part.embryo, task, in_order(each), image.shares.memory or image.pid)


def _make_threads(parts: Sequence[Part]) -> None:
    """Make all threads but the leaders, each with its id; none of them runs."""
    making = [(part, _others(part)) for part in parts]
    run_in_rounds(
        _rebuilding(part, part.embryo.leader, [_make_others(part, others)])
        for part, others in making
        if others
    )


def _others(part: Part) -> list[ThreadImage]:
    return [thread for thread in part.image.threads if thread.tid != Tid(part.image.pid)]


def _make_others(part: Part, others: Sequence[ThreadImage]) -> Restore:
    embryo = part.embryo
    already = len(embryo.leader.made)
    replies = yield [_clone(thread) for thread in others]
    for thread, reply in zip(others, replies, strict=True):
        if reply.error == errno.EEXIST:
            raise taken(thread.tid)
        if not reply.ok:
            raise RestoreFailed(f"making thread {thread.tid}", str(reply))
    made = embryo.leader.made[already:]
    for thread, tid in zip(others, made, strict=True):
        embryo.tasks[thread.tid] = adopt(tid, thread.tid)


def _clone(thread: ThreadImage) -> Call:
    raw = pack_clone_args(flags=_THREAD_FLAGS, n_set_tid=1)
    pointer = (clone_args.set_tid.offset, pack_set_tid([thread.tid]))
    return call(NR.clone3, In(raw, (pointer,)), len(raw))
