"""Batches on many tasks of a process at the same time, so that none waits for the others.

    arena   code | frame 0, table 0 | frame 1, table 1 | ...       one slot for each task

All tasks of a group are started before the first is waited for. Each has its own signal frame, so
each finds the way back by itself, as `arena.py` says of one.
"""

import os
from collections.abc import Sequence

import attrs

from ckpt.errors import CkptError, TargetGone
from ckpt.kernel import process_vm, ptrace
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.ptrace_burst import PtraceBurst
from ckpt.process import memory
from ckpt.process.arena import FRAME_PAGES, Arena, choose_end_mark
from ckpt.process.remote import Call, Replies, Reply, pack_batch, size_of
from ckpt.process.task import ALL_SIGNALS, Task
from ckpt.units import AddrRange, RemoteAddr, addr_range, iter_batches

_TABLE_BYTES = arch.PAGE_SIZE
_SLOT_BYTES = arch.PAGE_SIZE * FRAME_PAGES + _TABLE_BYTES
_NOT_RUN = (1 << 63).to_bytes(8, "little")
"""What no system call returns; stands in the last entry of a table until it was run."""


@attrs.define(slots=True, eq=False, repr=False)
class _Run:
    """One task's batch under way."""

    task: Task
    calls: Sequence[Call]
    sig: int
    frame_at: RemoteAddr
    table_at: RemoteAddr
    batch: bytes = b""

    @property
    def span(self) -> AddrRange:
        """Where its table is."""
        return addr_range(self.table_at, len(self.batch))

    @property
    def last_result(self) -> slice:
        """Where in `batch` the result of the last call is."""
        end = len(self.calls) * arch.CALL_SIZE
        return slice(end - 8, end)


def run_on_each(
    arena: Arena, asked: Sequence[tuple[Task, Sequence[Call]]]
) -> list[Sequence[Reply]]:
    """Run a batch on each of many tasks, as many at a time as the arena has room for.

    State:  all are stopped, their signal actions as they were when they were stopped.
    Shape:  one sequence of replies for each, in the order of `asked`.

    Raises:
        TargetGone, TargetDamaged: of the first task that this became of; all others have stopped.
    """
    n_slots = (arena.size - arch.PAGE_SIZE) // _SLOT_BYTES
    packing = _Packing()
    replies: list[Sequence[Reply]] = []
    for group in iter_batches(asked, n_slots):
        runs = [_plan(arena, index, *one, packing) for index, one in enumerate(group)]
        together = [one for one in runs if one is not None]
        if len(together) == len(group) > 1:
            replies += _run_together(arena, together)
        else:
            replies += [arena.run(task, calls) for task, calls in group]
    return replies


class _Packing:
    """The bytes of tables: most tasks are asked the same, and get the same again in a slot."""

    def __init__(self) -> None:
        self._last: dict[RemoteAddr, tuple[Sequence[Call], bytes]] = {}

    def pack(self, calls: Sequence[Call], at: RemoteAddr) -> bytes:
        """Return what `pack_batch` does, with a mark in the last entry; empty if too long."""
        last, batch = self._last.get(at, ((), b""))
        if last != calls:
            batch = b""
            if 0 < sum(map(size_of, calls)) <= _TABLE_BYTES:
                raw = bytearray(pack_batch(calls, at))
                end = len(calls) * arch.CALL_SIZE
                raw[end - 8 : end] = _NOT_RUN
                batch = bytes(raw)
            self._last[at] = calls, batch
        return batch


def _plan(
    arena: Arena, slot: int, task: Task, calls: Sequence[Call], packing: _Packing
) -> _Run | None:
    """Return how a task's batch is run in a slot; None if it must be run alone."""
    frame_at = RemoteAddr(arena.base + arch.PAGE_SIZE + slot * _SLOT_BYTES)
    table_at = RemoteAddr(frame_at + arch.PAGE_SIZE * FRAME_PAGES)
    batch, sig = packing.pack(calls, table_at), choose_end_mark(task, task.status_text)
    return _Run(task, calls, sig, frame_at, table_at, batch) if batch and sig else None


def _run_together(arena: Arena, runs: Sequence[_Run]) -> list[Sequence[Reply]]:
    _write(arena, runs)
    started, problem = _start(arena, runs)
    # Whatever happens to one: none may be in the arena any more when that is unmapped.
    for one in started:
        problem = _wait(one) or problem
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
            problem = _wait(one) or problem
        if problem is not None:
            raise problem
        _read(arena, early)
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
    pieces: list[process_vm.Piece] = []
    source = bytearray()
    for one in runs:
        task = one.task
        frame = arch.signal_frame(task.registers, task.xstate, task.sigmask, one.frame_at)
        pieces.append((one.frame_at, len(source), len(frame)))
        source += frame
        pieces.append((one.table_at, len(source), len(one.batch)))
        source += one.batch
    memory.write_pieces(arena.pid, pieces, source)


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
    started = [one for index, one in enumerate(runs) if results[3 * index + 2] == 0]
    return started, TargetGone(arena.pid) if any(results) else None


def _wait(one: _Run) -> CkptError | None:
    try:
        one.task.wait_for(one.sig)
    except CkptError as error:
        return error
    return None


def _read(arena: Arena, runs: Sequence[_Run]) -> None:
    raw = memory.read_ranges(arena.pid, [one.span for one in runs])
    at = 0
    for one in runs:
        one.batch = raw[at : at + one.span.len_bytes]
        at += one.span.len_bytes
