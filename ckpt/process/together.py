"""Batches on many tasks of a process at the same time, so that none waits for the others.

    arena   code | frame 0 | frame 1 | ...  -->          <--  ... | table 1 | table 0

As many tasks as the arena has room for are started before the first is waited for. Each has its own
signal frame, so each finds the way back by itself, as `arena.py` says of one. The tables stand side
by side, to be read in one go.
"""

import os
import time
from array import array
from collections.abc import Iterable, Sequence

import attrs

from ckpt.errors import CkptError, TargetGone
from ckpt.kernel import ptrace
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.ptrace_burst import PtraceBurst, StopBurst
from ckpt.process import memory
from ckpt.process.arena import Arena, choose_end_mark
from ckpt.process.remote import Call, Replies, Reply, pack_batch, size_of
from ckpt.process.task import ALL_SIGNALS, Task
from ckpt.units import RemoteAddr

_ALIGN = 64
_NOT_RUN = (1 << 63).to_bytes(8, "little")
"""What no system call returns; stands in the last entry of a table until it was run."""
_SPIN_S = 0.002


@attrs.define(slots=True, eq=False, repr=False)
class _Run:
    """One task's batch under way."""

    task: Task
    calls: Sequence[Call]
    sig: int
    frame_at: RemoteAddr
    frame: bytes
    table_at: RemoteAddr
    batch: bytes

    @property
    def mark(self) -> int:
        """The status word of its stop at the end."""
        return ptrace.word_of_stop(self.sig)

    @property
    def last_result(self) -> slice:
        """Where in `batch` the result of the last call is."""
        end = len(self.calls) * arch.CALL_SIZE
        return slice(end - 8, end)


def run_on_each(
    arena: Arena,
    asked: Sequence[tuple[Task, Sequence[Call]]],
    status_text: bytes | None = None,
) -> list[Sequence[Reply]]:
    """Run a batch on each of many tasks, as many at a time as the arena has room for.

    State:  all are stopped, their signal actions as they were when they were stopped.
    Shape:  one sequence of replies for each, in the order of `asked`.

    Args:
        arena: where they run.
        asked: each task and its calls.
        status_text: /proc/PID/status of any of them, where the others have no signals pending for
            themselves but those in `Task.reserved`; None: each has its own.

    Raises:
        TargetGone, TargetDamaged: of the first task that this became of; all others have stopped.
    """
    replies: list[Sequence[Reply]] = []
    layout, group = _Layout(arena), list[_Run]()
    for task, calls in asked:
        one = layout.place(task, calls, status_text)
        if one is None:
            replies += _run_together(arena, group)
            layout.clear()
            group = []
            one = layout.place(task, calls, status_text)
        if one is None:
            replies.append(arena.run(task, calls))
        else:
            group.append(one)
    return replies + _run_together(arena, group)


class _Layout:
    """Finds room for frames and tables in an arena, from both of its ends."""

    def __init__(self, arena: Arena) -> None:
        self._start = arena.base + arch.PAGE_SIZE
        self._end = arena.base + arena.size
        self._calls: Sequence[Call] = ()
        self._template: _Template | None = None
        self.clear()

    def clear(self) -> None:
        """Begin again with all of the arena."""
        self._frames_end, self._tables_start = self._start, self._end

    def place(self, task: Task, calls: Sequence[Call], status_text: bytes | None) -> _Run | None:
        """Return how a task's batch is run; None if there is no room for it, or no end mark."""
        sig = choose_end_mark(task, status_text or task.status_text)
        if sig is None or not calls:
            return None
        frame_at = RemoteAddr(self._frames_end)
        frame = arch.signal_frame(task.registers, task.xstate, task.sigmask, frame_at)
        frame_end = frame_at + len(frame) + -len(frame) % _ALIGN
        batch = self._pack(calls, self._tables_start)
        table_at = RemoteAddr(self._tables_start - len(batch))
        if table_at < frame_end:
            return None
        self._frames_end, self._tables_start = frame_end, table_at
        return _Run(task, calls, sig, frame_at, frame, table_at, batch)

    def _pack(self, calls: Sequence[Call], end: int) -> bytes:
        """Return what `pack_batch` does for the room below `end`, with a mark in the last entry.

        Most tasks are asked the same as the one before.
        """
        if calls != self._calls:
            self._calls, self._template = calls, None
            return _pack_marked(calls, end)
        if self._template is None:
            self._template = _Template(calls)
        return self._template.at(end)


def _pack_marked(calls: Sequence[Call], end: int) -> bytes:
    size = sum(map(size_of, calls))
    size += -size % _ALIGN
    raw = bytearray(pack_batch(calls, RemoteAddr(end - size)).ljust(size, b"\0"))
    last = len(calls) * arch.CALL_SIZE
    raw[last - len(_NOT_RUN) : last] = _NOT_RUN
    return bytes(raw)


class _Template:
    """A packed batch that can be put anywhere."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._end = 1 << 40
        self._words = array("Q", _pack_marked(calls, self._end))
        moved = array("Q", _pack_marked(calls, self._end + _ALIGN))
        pairs = enumerate(zip(self._words, moved, strict=True))
        self._addresses = [index for index, (here, there) in pairs if here != there]

    def at(self, end: int) -> bytes:
        """Return the batch for the addresses that end at `end`."""
        words = self._words[:]
        for index in self._addresses:
            words[index] += end - self._end
        return words.tobytes()


def _run_together(arena: Arena, runs: Sequence[_Run]) -> list[Sequence[Reply]]:
    if not runs:
        return []
    _write(arena, runs)
    started, problem = _start(arena, runs)
    # Whatever happens to one: none may be in the arena any more when that is unmapped.
    problem = _wait(started) or problem
    if problem is not None:
        raise problem
    _read(arena, runs)
    meant_for_it: set[int] = set()
    while early := [one for one in runs if one.batch[one.last_result] == _NOT_RUN]:
        # Somebody has sent it the very signal. It ignores that, or blocks it and may wait for it.
        for one in early:
            if one.task.sigmask >> (one.sig - 1) & 1:
                meant_for_it.add(one.sig)
            ptrace.cont(one.task.tid)
        problem = _wait(early)
        if problem is not None:
            raise problem
        _read(arena, runs)
    # Before anything else: the next group uses the same frames.
    _put_back([one.task for one in runs])
    for sig in meant_for_it:
        os.kill(arena.pid, sig)
    return [Replies(one.calls, one.batch) for one in runs]


def _put_back(tasks: Sequence[Task]) -> None:
    burst = PtraceBurst()
    for task in tasks:
        # The mask first, as `Task.put_back` has it.
        burst.set_sigmask(task.tid, task.sigmask)
        burst.set_registers(task.tid, task.registers)
    results = burst.run()
    for index, task in enumerate(tasks):
        if any(results[2 * index : 2 * index + 2]):
            task.put_back()
        task.disturbed = False


def _write(arena: Arena, runs: Sequence[_Run]) -> None:
    frames = b"".join(one.frame.ljust(len(one.frame) + -len(one.frame) % _ALIGN) for one in runs)
    tables = b"".join(one.batch for one in reversed(runs))
    pieces = [
        (int(runs[0].frame_at), 0, len(frames)),
        (int(runs[-1].table_at), len(frames), len(tables)),
    ]
    memory.write_pieces(arena.pid, pieces, frames + tables)


def _start(arena: Arena, runs: Sequence[_Run]) -> tuple[list[_Run], CkptError | None]:
    """Let all tasks run; return those that do, and why not all."""
    burst = PtraceBurst()
    for one in runs:
        task = one.task
        registers = arch.batch_registers(
            task.registers,
            arena.base,
            one.table_at,
            len(one.calls),
            arena.tgid,
            task.tid,
            one.sig,
            one.frame_at,
        )
        task.will_run()
        # The registers first: if we are killed in between, nothing stays blocked.
        burst.set_registers(task.tid, registers)
        burst.set_sigmask(task.tid, ALL_SIGNALS & ~(1 << (one.sig - 1)))
        burst.cont(task.tid)
    results = burst.run()
    started = [one for one, result in zip(runs, results[2::3], strict=True) if result == 0]
    return started, TargetGone(arena.pid) if any(results) else None


def _wait(runs: Iterable[_Run]) -> CkptError | None:
    """Wait until all have stopped; return why one of them did not stop well."""
    problem: CkptError | None = None
    running = {one.task.tid: one for one in runs}
    stops = StopBurst(running)
    spin_until_s = time.monotonic() + _SPIN_S
    while running and time.monotonic() < spin_until_s:
        stopped = stops.take()
        for tid, word in stopped.items():
            if word != running[tid].mark:
                problem = _go_on(running[tid], word) or problem
            del running[tid]
        if not stopped:
            os.sched_yield()
    for one in running.values():
        problem = _wait_alone(one) or problem
    return problem


def _go_on(one: _Run, word: int) -> CkptError | None:
    """Let a task go on that has stopped for another reason, to its mark."""
    try:
        if not one.task.is_at(one.sig, ptrace.parse_wait_status(one.task.tid, word)):
            ptrace.cont(one.task.tid)
            one.task.wait_for(one.sig)
    except CkptError as error:
        return error
    return None


def _wait_alone(one: _Run) -> CkptError | None:
    try:
        one.task.wait_for(one.sig)
    except CkptError as error:
        return error
    return None


def _read(arena: Arena, runs: Sequence[_Run]) -> None:
    first, end = runs[-1].table_at, runs[0].table_at + len(runs[0].batch)
    raw = memory.read(arena.pid, first, end - first)
    for one in runs:
        at = one.table_at - first
        one.batch = raw[at : at + len(one.batch)]
