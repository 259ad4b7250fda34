"""Putting back what processes and threads have: of all at once, of each in its own order.

    thread 1    calls -> replies    calls -> replies    ...
    thread 2    calls -> replies    nothing more to ask
                round 1             round 2

A thread's restores follow each other; those of different threads do not touch each other, and those
of different processes say so where they do (`files/late.py`). So what each thread asks for next is
run in one round on all of them, instead of waiting for every thread's every batch. Neighbours:
`building` says who is restored when, `process/together` runs a round.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import attrs

from ckpt.kernel.procfs.files import read_bytes
from ckpt.process.remote import Call, Reply
from ckpt.process.seed import Embryo
from ckpt.process.task import Task
from ckpt.process.together import Asked, run_on_all
from ckpt.resources.base import Restore
from ckpt.units import Pid


def in_order(restores: Sequence[Restore]) -> Restore:
    """Make one of many: each begins when the one before has ended.

    A list, not a generator of them: that would look up its variables when they are others'.
    """
    for restore in restores:
        yield from restore


@attrs.frozen(slots=True, eq=False, repr=False)
class Rebuilding:
    """What is restored of one thread."""

    embryo: Embryo
    task: Task
    restore: Restore
    memory: Pid
    """Whose memory the process has. Those that share one have one arena, and take turns there."""


def run_in_rounds(restores: Iterable[Rebuilding]) -> None:
    """Drive one restore for each of some threads, of one or many processes, to its end.

    State:  no thread runs; a signal that is queued for one of them alone is in its `reserved`.

    Raises:
        CkptError: whatever a restore raises, at once; the others are left where they are.
    """
    asked = [(one, calls) for one in restores if (calls := next(one.restore, None)) is not None]
    while asked:
        replies = _run(asked)
        asked = [
            (one, calls)
            for (one, _), own in zip(asked, replies, strict=True)
            if (calls := _answer(one.restore, own)) is not None
        ]


def _run(asked: Sequence[tuple[Rebuilding, list[Call]]]) -> list[list[Reply]]:
    """Run what is asked of each; who asks for nothing waits for nothing."""
    replies: list[list[Reply]] = [[] for _ in asked]
    status_texts: dict[Pid, bytes] = {}
    for turn in _in_turns(asked):
        batches = []
        for index in turn:
            one, calls = asked[index]
            embryo = one.embryo
            text = status_texts.get(embryo.pid)
            if text is None:
                text = read_bytes(embryo.reachable_as, "status")
                status_texts[embryo.pid] = text
            batches.append(Asked(embryo.arena, one.task, calls, text))
        for index, answer in zip(turn, run_on_all(batches), strict=True):
            replies[index] = list(answer)
    return replies


def _in_turns(asked: Sequence[tuple[Rebuilding, list[Call]]]) -> list[list[int]]:
    """Return who can run at the same time: of those that share memory, one process at a time."""
    n_of_memory: Counter[Pid] = Counter()
    turn_of: dict[Pid, int] = {}
    turns: list[list[int]] = []
    for index, (one, calls) in enumerate(asked):
        if not calls:
            continue
        pid = one.embryo.pid
        if pid not in turn_of:
            turn_of[pid] = n_of_memory[one.memory]
            n_of_memory[one.memory] += 1
        turn = turn_of[pid]
        while turn >= len(turns):
            turns.append([])
        turns[turn].append(index)
    return turns


def _answer(restore: Restore, replies: list[Reply]) -> list[Call] | None:
    """Send a restore its replies; return what it asks for next, None if it has ended."""
    try:
        return restore.send(replies)
    except StopIteration:
        return None
