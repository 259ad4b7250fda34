"""Putting back what many threads have for themselves: all of them at once, each in its own order.

    thread 1    calls -> replies    calls -> replies    ...
    thread 2    calls -> replies    nothing more to ask
                round 1             round 2

A thread's restores follow each other; those of different threads do not touch each other. So what
each thread asks for next is run in one round on all of them, instead of waiting for every thread's
every batch. Neighbours: `restore` says who is restored when, `process/together` runs a round.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from ckpt.kernel.procfs.files import read_bytes
from ckpt.process.remote import Call, Reply
from ckpt.process.seed import Embryo
from ckpt.process.task import Task
from ckpt.process.together import run_on_each
from ckpt.resources.base import Restore


def in_order(restores: Sequence[Restore]) -> Restore:
    """Make one of many: each begins when the one before has ended.

    A list, not a generator of them: that would look up its variables when they are others'.
    """
    for restore in restores:
        yield from restore


def run_alone(embryo: Embryo, restoring: Restore) -> None:
    """Drive one restore on the leader of an embryo: run what it yields, send the replies."""
    with contextlib.suppress(StopIteration):
        calls = next(restoring)
        while True:
            calls = restoring.send(embryo.run(calls) if calls else [])


def run_in_rounds(embryo: Embryo, restores: Iterable[tuple[Task, Restore]]) -> None:
    """Drive one restore for each of some threads of an embryo to its end.

    State:  no thread runs; a signal that is queued for one of them alone is in its `reserved`.

    Raises:
        CkptError: whatever a restore raises, at once; the others are left where they are.
    """
    asked = [
        (task, restore, calls)
        for task, restore in restores
        if (calls := next(restore, None)) is not None
    ]
    while asked:
        replies = _run(embryo, [(task, calls) for task, _, calls in asked])
        asked = [
            (task, restore, calls)
            for (task, restore, _), own in zip(asked, replies, strict=True)
            if (calls := _answer(restore, own)) is not None
        ]


def _run(embryo: Embryo, asked: Sequence[tuple[Task, list[Call]]]) -> list[list[Reply]]:
    """Run what is asked of each; who asks for nothing waits for nothing."""
    some = [one for one in asked if one[1]]
    answers: Iterator[Sequence[Reply]] = iter(())
    if some:
        status_text = read_bytes(embryo.pid, "status")
        answers = iter(run_on_each(embryo.arena, some, status_text))
    return [list(next(answers)) if calls else [] for _, calls in asked]


def _answer(restore: Restore, replies: list[Reply]) -> list[Call] | None:
    """Send a restore its replies; return what it asks for next, None if it has ended."""
    try:
        return restore.send(replies)
    except StopIteration:
        return None
