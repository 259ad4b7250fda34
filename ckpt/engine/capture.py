"""Asking every resource of a frozen process, with as few stops as can be.

What can be read from outside is read first, before an arena exists, so that no record shows our own
mapping. Then the remote calls of all resources of the process run as one batch, and those of each
thread as one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from ckpt.engine.records import ProcessImage, ThreadImage
from ckpt.errors import Finding, UnsupportedState
from ckpt.kernel.features import Features
from ckpt.kernel.procfs.held import HeldFiles
from ckpt.process.arena import Arena
from ckpt.process.freezer import Frozen
from ckpt.process.remote import Call, Reply, part_of
from ckpt.process.task import Task
from ckpt.process.together import run_on_each
from ckpt.process.tree import ending_told, list_tids
from ckpt.resources.base import Capture, Resource, Stopped, Target
from ckpt.resources.registry import PROCESS, THREAD
from ckpt.units import Pid, Tid


def look(pid: Pid, features: Features) -> list[Finding]:
    """Return everything that stands in the way of a dump; the target is not touched."""
    with ending_told(pid):
        return list(_iter_findings(Target(pid, features)))


def _iter_findings(target: Target) -> Iterator[Finding]:
    for resource in (*PROCESS, *THREAD):
        yield from resource.look(target)


def examine(pid: Pid, features: Features) -> Target:
    """Look at a process before it is stopped; what was read is noted for the capture.

    Raises:
        UnsupportedState: it owns what cannot be captured; all findings at once.
    """
    target = Target(pid, features)
    with ending_told(pid):
        findings = tuple(_iter_findings(target))
        target.notes[_STATUSES] = HeldFiles(pid, list(map(_status_of, list_tids(pid))))
    if findings:
        raise UnsupportedState(pid, findings)
    return target


_STATUSES = "status of threads"


def _status_of(tid: Tid) -> str:
    return f"task/{tid}/status"


def settle(image: ProcessImage) -> ProcessImage:
    """Build what is not built yet and complete the records of an image, after the thaw."""
    return attrs.evolve(
        image,
        resources=_complete(PROCESS, image.resources),
        threads=tuple(
            attrs.evolve(thread, resources=_complete(THREAD, thread.resources))
            for thread in image.threads
        ),
    )


def _complete(kinds: Iterable[Resource[Any]], captured: Mapping[str, Any]) -> dict[str, Any]:
    return {resource.name: resource.complete(captured[resource.name]) for resource in kinds}


@attrs.define(repr=False)
class _Asked:
    """One resource's capture under way."""

    name: str
    capture: Capture[Any]
    calls: list[Call]
    record: Any = None


class Capturing:
    """The captures of all resources of a frozen process; begun without, ended with an arena."""

    def __init__(self, frozen: Frozen, target: Target) -> None:
        """Read everything that can be read from outside."""
        self._frozen = frozen
        self._read_statuses(target)
        leader = Stopped(frozen, frozen.leader, target.features, target.notes)
        self._process = [_begin(resource, leader) for resource in PROCESS]
        self._threads: dict[Tid, list[_Asked]] = {}
        for tid, task in frozen.tasks.items():
            stopped = Stopped(frozen, task, target.features, target.notes)
            self._threads[tid] = [_begin(resource, stopped) for resource in THREAD]

    def _read_statuses(self, target: Target) -> None:
        """Read the status of all threads at once; one that is new is read when it is asked for."""
        held: HeldFiles | None = target.notes.get(_STATUSES)
        texts = held.read() if held else {}
        for tid, task in self._frozen.tasks.items():
            text = texts.get(_status_of(tid))
            if text is not None:
                task.status_text = text

    def finish(self, arena: Arena) -> ProcessImage:
        """Run the remote calls and return all records."""
        frozen = self._frozen
        leader = frozen.leader.tid
        # Process and leader are asked by the same thread: together, that is a batch less.
        _finish([*self._process, *self._threads[leader]], arena, frozen.leader)
        others = [(frozen.tasks[t], asked) for t, asked in self._threads.items() if t != leader]
        _finish_each(others, arena)
        return ProcessImage(
            pid=frozen.pid,
            stopped_by=frozen.leader.group_stopped,
            resources=_records_of(self._process),
            threads=tuple(
                ThreadImage(tid, _records_of(asked)) for tid, asked in self._threads.items()
            ),
        )


def _begin(resource: Resource[Any], stopped: Stopped) -> _Asked:
    capture = resource.capture(stopped)
    return _Asked(resource.name, capture, next(capture))


def _finish(under_way: list[_Asked], arena: Arena, task: Task) -> None:
    """Run rounds of one batch each until every capture has its record."""
    _finish_each([(task, under_way)], arena)


def _finish_each(under_way: list[tuple[Task, list[_Asked]]], arena: Arena) -> None:
    """Do so for many tasks, a round on all of them at a time."""
    while under_way:
        asked = [
            (task, [call for one in all_of for call in one.calls]) for task, all_of in under_way
        ]
        answers = iter(run_on_each(arena, [one for one in asked if one[1]]))
        still: list[tuple[Task, list[_Asked]]] = []
        for (task, all_of), (_, calls) in zip(under_way, asked, strict=True):
            replies = next(answers) if calls else ()
            going_on = _answer(all_of, replies)
            if going_on:
                still.append((task, going_on))
        under_way = still


def _answer(all_of: list[_Asked], replies: Sequence[Reply]) -> list[_Asked]:
    """Give each capture its replies; return those that ask for more."""
    going_on = []
    at = 0
    for one in all_of:
        end = at + len(one.calls)
        try:
            one.calls = one.capture.send(part_of(replies, at, end))
            going_on.append(one)
        except StopIteration as stop:
            one.record = stop.value
        at = end
    return going_on


def _records_of(asked: Iterable[_Asked]) -> dict[str, Any]:
    return {one.name: one.record for one in asked}
