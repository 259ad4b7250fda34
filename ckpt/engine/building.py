"""Building the processes of a tree, from embryos that were planted to the point of letting go.

born          each by its parent, in its session and group (`growing`); with its memory, filled
resources     stage by stage (`resources.base.Stage`)
threads       made with their ids, then each one's own state

Everything here is done to processes that die with us. Neighbours: `preparing` opened the files that
they inherit, `restore` and migration let them go.
"""

import contextlib
import errno
from collections.abc import Callable
from typing import Any

import attrs

from ckpt.engine.fill import fill
from ckpt.engine.growing import Growing
from ckpt.engine.guard import Lazy, Server, start_server, watching
from ckpt.engine.rebuilding import in_order, run_in_rounds
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
from ckpt.resources.base import Rebuilt, Resource, Stage
from ckpt.resources.registry import PROCESS, THREAD
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
    """What is filled before it runs."""
    lazy: Lazy | None = None
    """What is filled while it runs."""
    inherited: dict[str, RemoteFd] = attrs.Factory(dict)
    embryo: Embryo = attrs.field(init=False)


@attrs.define(repr=False)
class Building:
    """A tree under construction."""

    tree: TreeImage
    parts: dict[Pid, Part]
    reader: PageReader
    features: Features
    warn: Callable[[str], None]
    servers: list[Server] = attrs.Factory(list)

    def build(self, nursery: Nursery) -> None:
        """Make all processes and threads, and give each its state; only our arenas are left.

        State: what they inherit is open in the root's embryo; `Part.inherited` says where.

        Raises:
            PidTaken: a number is in use.
            RestoreFailed: the kernel refused something.
        """
        Growing(self.tree, nursery, self._give_memory, self._give_terminal).grow()
        parts = self.parts.values()
        for stage in (Stage.FILES, Stage.PROCESS):
            for part in parts:
                self._restore_process(part, stage)
        for part in parts:
            _make_threads(part)
        for part in parts:
            self._restore_threads(part, Stage.THREAD)
        for stage in (Stage.LATE, Stage.CREDENTIALS):
            for part in parts:
                self._restore_process(part, stage)
                self._restore_threads(part, stage)

    def _give_memory(self, image: ProcessImage, embryo: Embryo) -> None:
        part = self.parts[image.pid]
        part.embryo = embryo
        self._restore_process(part, Stage.MEMORY)

    def _give_terminal(self, image: ProcessImage) -> None:
        self._restore_process(self.parts[image.pid], Stage.SESSION)

    def _restore_process(self, part: Part, stage: Stage) -> None:
        for resource in filter(part.image.owns, PROCESS):
            if resource.stage is stage:
                self._run_restore(part, resource, part.image.resources[resource.name])

    def _restore_threads(self, part: Part, stage: Stage) -> None:
        resources = [resource for resource in THREAD if resource.stage is stage]
        restores = []
        for thread in part.image.threads:
            rebuilt = self._rebuilt(part, part.embryo.tasks[thread.tid])
            each = [one.restore(thread.resources[one.name], rebuilt) for one in resources]
            restores.append((rebuilt.task, in_order(each)))
        run_in_rounds(part.embryo, restores)

    def _run_restore(self, part: Part, resource: Resource[Any], record: object) -> None:
        """Drive one resource's generator: run what it yields, send the replies."""
        restoring = resource.restore(record, self._rebuilt(part, part.embryo.leader))
        with contextlib.suppress(StopIteration):
            calls = next(restoring)
            while True:
                calls = restoring.send(part.embryo.run(calls) if calls else [])

    def _rebuilt(self, part: Part, task: Task) -> Rebuilt:
        return Rebuilt(
            embryo=part.embryo,
            task=task,
            features=self.features,
            inherited=part.inherited,
            fill=lambda: self._fill(part),
            warn=self.warn,
        )

    def _fill(self, part: Part) -> None:
        """Write the stored pages into the mapped embryo."""
        vmas = part.image.resources["memory"].vmas
        if part.lazy is None:
            fill(part.embryo, self.reader, part.at_once, vmas)
            return
        with watching(part.lazy, part.embryo) as fd:
            fill(part.embryo, self.reader, part.at_once, vmas)
            self.servers.append(start_server(part.lazy, part.embryo.pid, fd))


def _make_threads(part: Part) -> None:
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
