"""The numbers of a tree in a pid namespace of its own, in place of those that we see.

A capture speaks of processes as we see them. An image speaks of them as they do themselves, so that
it is the same wherever the namespace is. Neighbours: `capture` before, `home` when it is restored.
"""

import contextlib
from collections.abc import Iterator

import attrs

from ckpt.engine.records import Place, ProcessImage, ThreadImage, TreeImage
from ckpt.errors import TargetGone
from ckpt.kernel.procfs.stat import read_stat
from ckpt.kernel.procfs.status import Status, read_status
from ckpt.process.freezer import FrozenTree
from ckpt.process.pid_space import Numbers, numbers_in
from ckpt.resources.registry import PROCESS, THREAD
from ckpt.units import Pid, Tid


def read_numbers(frozen: FrozenTree) -> Numbers | None:
    """Return the numbers of a frozen tree; None if it has those that we see."""
    if not frozen.processes[frozen.root].is_nested:
        return None
    return numbers_in(_iter_statuses(frozen))


def _iter_statuses(frozen: FrozenTree) -> Iterator[tuple[Status, int, int]]:
    tids = [tid for one in frozen.processes.values() for tid in one.tasks]
    for task in map(Pid, (*tids, *frozen.zombies)):
        # One that nobody waits for is gone with its end.
        with contextlib.suppress(TargetGone):
            stat = read_stat(task)
            yield read_status(task), stat.pgrp, stat.session


def renumber(tree: TreeImage, numbers: Numbers) -> TreeImage:
    """Return the image of a tree as it knows itself."""
    return TreeImage(
        tuple(_renumber_process(process, numbers) for process in tree.processes),
        tuple(
            attrs.evolve(
                zombie,
                pid=Pid(numbers.of(zombie.pid)),
                place=_renumber_place(zombie.place, numbers),
            )
            for zombie in tree.zombies
        ),
    )


def _renumber_process(process: ProcessImage, numbers: Numbers) -> ProcessImage:
    return attrs.evolve(
        process,
        pid=Pid(numbers.of(process.pid)),
        place=_renumber_place(process.place, numbers),
        shares=attrs.evolve(
            process.shares,
            **{common.value: Pid(numbers.of(pid)) for common, pid in process.shares.items()},
        ),
        resources=dict(process.resources)
        | {
            one.name: one.renumber(process.resources[one.name], numbers)
            for one in PROCESS
            if one.name in process.resources
        },
        threads=tuple(_renumber_thread(thread, numbers) for thread in process.threads),
    )


def _renumber_thread(thread: ThreadImage, numbers: Numbers) -> ThreadImage:
    records = {one.name: one.renumber(thread.resources[one.name], numbers) for one in THREAD}
    return ThreadImage(Tid(numbers.of(thread.tid)), dict(thread.resources) | records)


def _renumber_place(place: Place, numbers: Numbers) -> Place:
    return attrs.evolve(
        place,
        parent=Pid(numbers.of(place.parent)),
        session=Pid(numbers.of(place.session)),
        group=Pid(numbers.of(place.group)),
    )
