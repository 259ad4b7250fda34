"""Asking every resource of a frozen process, with as few stops as can be.

What can be read from outside is read first, before an arena exists, so that no record shows our own
mapping. Then the remote calls of all resources of the process run as one batch, and those of each
thread as one.
"""

from collections.abc import Iterable
from typing import Any

import attrs

from ckpt.engine.records import ProcessImage, ThreadImage
from ckpt.errors import Finding, UnsupportedState
from ckpt.kernel.features import Features
from ckpt.process.arena import Arena
from ckpt.process.freezer import Frozen
from ckpt.process.remote import Call, Reply
from ckpt.process.task import Task
from ckpt.resources.base import Capture, Resource, Stopped, Target
from ckpt.resources.registry import PROCESS, THREAD
from ckpt.units import Pid, Tid


def look(pid: Pid, features: Features) -> list[Finding]:
    """Return everything that stands in the way of a dump; the target is not touched."""
    target = Target(pid, features)
    return [finding for resource in (*PROCESS, *THREAD) for finding in resource.look(target)]


def refuse_unsupported(pid: Pid, features: Features) -> None:
    """Refuse a process that owns something we cannot capture, all findings at once.

    Raises:
        UnsupportedState: with every finding.
    """
    findings = look(pid, features)
    if findings:
        raise UnsupportedState(pid, tuple(findings))


@attrs.define
class _Asked:
    """One resource's capture under way."""

    name: str
    capture: Capture[Any]
    calls: list[Call]


class Capturing:
    """The captures of all resources of a frozen process; begun without, ended with an arena."""

    def __init__(self, frozen: Frozen, features: Features) -> None:
        """Read everything that can be read from outside."""
        self._frozen = frozen
        leader = Stopped(frozen, frozen.leader, features)
        self._process = [_begin(resource, leader) for resource in PROCESS]
        self._threads: dict[Tid, list[_Asked]] = {}
        for tid, task in frozen.tasks.items():
            stopped = Stopped(frozen, task, features)
            self._threads[tid] = [_begin(resource, stopped) for resource in THREAD]

    def finish(self, arena: Arena) -> ProcessImage:
        """Run the remote calls and return all records."""
        frozen = self._frozen
        return ProcessImage(
            pid=frozen.pid,
            stopped_by=frozen.leader.group_stopped,
            resources=_finish(self._process, arena, frozen.leader),
            threads=tuple(
                ThreadImage(tid, _finish(asked, arena, frozen.tasks[tid]))
                for tid, asked in self._threads.items()
            ),
        )


def _begin(resource: Resource[Any], stopped: Stopped) -> _Asked:
    capture = resource.capture(stopped)
    return _Asked(resource.name, capture, next(capture))


def _finish(asked: Iterable[_Asked], arena: Arena, task: Task) -> dict[str, Any]:
    """Run rounds of one batch each until every capture has returned its record."""
    records: dict[str, Any] = {}
    under_way = list(asked)
    while under_way:
        calls = [call for one in under_way for call in one.calls]
        replies = iter(arena.run(task, calls) if calls else [])
        still: list[_Asked] = []
        for one in under_way:
            mine: list[Reply] = [next(replies) for _ in one.calls]
            try:
                one.calls = one.capture.send(mine)
                still.append(one)
            except StopIteration as stop:
                records[one.name] = stop.value
        under_way = still
    return records
