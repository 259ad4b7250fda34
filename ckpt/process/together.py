"""Batches on many tasks, of one or many processes, at the same time: none waits for the others.

    arena   code | frame 0 | frame 1 | ...  -->          <--  ... | table 1 | table 0

As many tasks as the arenas have room for are started before the first is waited for. Each has its
own signal frame, so each finds the way back by itself, as `arena.py` says of one. The tables of one
arena stand side by side, to be read in one go.
"""

import contextlib
import os
from array import array
from collections import deque
from collections.abc import Iterable, Sequence

import attrs

from ckpt.errors import CkptError, TargetGone
from ckpt.kernel import ptrace
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.ptrace_burst import PtraceBurst
from ckpt.kernel.vm_burst import VmBurst
from ckpt.process.arena import Arena, choose_end_mark
from ckpt.process.remote import BatchLayout, Call, Replies, Reply, pack_batch, size_of
from ckpt.process.task import ALL_SIGNALS, Task
from ckpt.process.waiting import Waiting
from ckpt.units import Pid, RemoteAddr

_ALIGN = 64
_NOT_RUN = (1 << 63).to_bytes(8, "little")
"""What no system call returns; stands in the last entry of a table until it was run."""
_N_KNOWN = 4
"""How many different batches are remembered."""


Answer = Sequence[Reply] | CkptError
"""Replies to all calls of a batch; or TargetGone, TargetDamaged: there are none."""


@attrs.frozen(slots=True, eq=False, repr=False)
class Asked:
    """A batch for one task."""

    arena: Arena
    """Of its process."""
    task: Task
    calls: Sequence[Call]
    status_text: bytes | None = None
    """/proc/PID/status of any task of the process, where this one has no signals pending for itself
    but those in `Task.reserved`; None: its own."""


@attrs.define(slots=True, eq=False, repr=False)
class _Run:
    """One task's batch under way."""

    arena: Arena
    task: Task
    layout: BatchLayout
    sig: int
    frame_at: RemoteAddr
    frame: bytes
    table_at: RemoteAddr
    batch: bytes
    problem: CkptError | None = None
    """Why there is no answer."""

    @property
    def mark(self) -> int:
        """The status word of its stop at the end."""
        return ptrace.word_of_stop(self.sig)

    @property
    def is_early(self) -> bool:
        """Whether it has stopped before its last call."""
        end = len(self.layout.calls) * arch.CALL_SIZE
        return self.problem is None and self.batch[end - 8 : end] == _NOT_RUN

    @property
    def answer(self) -> Answer:
        """What came of it."""
        return self.problem or Replies(self.layout, self.batch)


def run_on_each(
    arena: Arena,
    asked: Sequence[tuple[Task, Sequence[Call]]],
    status_text: bytes | None = None,
) -> list[Sequence[Reply]]:
    """Run a batch on each of many tasks of one process; see `run_on_all`."""
    return run_on_all([Asked(arena, task, calls, status_text) for task, calls in asked])


def run_on_all(asked: Sequence[Asked]) -> list[Sequence[Reply]]:
    """Run a batch on each of many tasks, and want the answers of all.

    State, Shape: as `try_on_all`.

    Raises:
        TargetGone, TargetDamaged: of the first task that this became of; all others have stopped.
    """
    return [expect_answer(answer) for answer in try_on_all(asked)]


def expect_answer(answer: Answer) -> Sequence[Reply]:
    """Return the replies.

    Raises:
        TargetGone, TargetDamaged: it is that.
    """
    if isinstance(answer, CkptError):
        raise answer
    return answer


def try_on_all(asked: Sequence[Asked]) -> list[Answer]:
    """Run a batch on each of many tasks, as many at a time as their arenas have room for.

    State:  all are stopped, their signal actions as they were when they were stopped.
    Shape:  one answer for each, in the order of `asked`.
    """
    replies: list[Answer] = [()] * len(asked)
    waiting: dict[int, deque[int]] = {}
    for index, one in enumerate(asked):
        waiting.setdefault(one.arena.pid, deque()).append(index)
    packer = _Packer()
    while waiting:
        group: dict[int, _Run] = {}
        for pid, queue in list(waiting.items()):
            _fill(asked, queue, packer, group, replies)
            if not queue:
                del waiting[pid]
        for index, answer in zip(group, _run_together(list(group.values())), strict=True):
            replies[index] = answer
    return replies


def _fill(
    asked: Sequence[Asked],
    queue: deque[int],
    packer: "_Packer",
    group: dict[int, _Run],
    replies: list[Answer],
) -> None:
    """Take so many of those that wait for one arena as it has room for; one that never fits alone.

    Args:
        asked: all of them.
        queue: which of them wait for this arena.
        packer: lays out their calls.
        group: gets those that are run next.
        replies: gets the answers of one that was run alone.
    """
    layout = _Layout(asked[queue[0]].arena, packer)
    while queue:
        one = layout.place(asked[queue[0]])
        if one is not None:
            group[queue.popleft()] = one
        elif layout.is_empty:
            index = queue.popleft()
            replies[index] = _run_alone(asked[index])
        else:
            return


def _run_alone(asked: Asked) -> Answer:
    try:
        return asked.arena.run(asked.task, asked.calls)
    except CkptError as error:
        return error


class _Layout:
    """Finds room for frames and tables in an arena, from both of its ends."""

    def __init__(self, arena: Arena, packer: "_Packer") -> None:
        self._frames_end = arena.base + arch.PAGE_SIZE
        self._tables_start = arena.base + arena.size
        self._packer = packer
        self.is_empty = True

    def place(self, asked: Asked) -> _Run | None:
        """Return how a task's batch is run; None if there is no room for it, or no end mark."""
        task, calls = asked.task, asked.calls
        sig = choose_end_mark(task, asked.status_text or task.status_text)
        if sig is None or not calls:
            return None
        frame_at = RemoteAddr(self._frames_end)
        frame = arch.signal_frame(task.registers, task.xstate, task.sigmask, frame_at)
        frame_end = frame_at + len(frame) + -len(frame) % _ALIGN
        layout, batch = self._packer.pack(calls, self._tables_start)
        table_at = RemoteAddr(self._tables_start - len(batch))
        if table_at < frame_end:
            return None
        self._frames_end, self._tables_start = frame_end, table_at
        self.is_empty = False
        return _Run(asked.arena, task, layout, sig, frame_at, frame, table_at, batch)


class _Packer:
    """Packs batches; most tasks are asked the same as one of those before."""

    def __init__(self) -> None:
        self._known: deque[_Known] = deque(maxlen=_N_KNOWN)

    def pack(self, calls: Sequence[Call], end: int) -> tuple[BatchLayout, bytes]:
        """Return what `pack_batch` does for the room below `end`, with a mark in the last entry."""
        for known in self._known:
            if known.layout.calls == calls:
                known.template = known.template or _Template(calls)
                return known.layout, known.template.at(end)
        new = _Known(BatchLayout(calls))
        self._known.appendleft(new)
        return new.layout, _pack_marked(calls, end)


@attrs.define(slots=True, eq=False, repr=False)
class _Known:
    layout: BatchLayout
    template: "_Template | None" = None
    """Made when the same is asked for the second time."""


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


def _run_together(runs: Sequence[_Run]) -> list[Answer]:
    by_arena: dict[int, list[_Run]] = {}
    for one in runs:
        by_arena.setdefault(one.arena.pid, []).append(one)
    parts = list(by_arena.values())
    _write(parts)
    # Whatever happens to one: none may be in an arena any more when that is unmapped.
    _wait(_start([one for one in runs if one.problem is None]))
    _read(parts)
    meant_for_it: set[tuple[Pid, int]] = set()
    while early := [one for one in runs if one.is_early]:
        # Somebody has sent it the very signal. It ignores that, or blocks it and may wait for it.
        for one in early:
            if one.task.sigmask >> (one.sig - 1) & 1:
                meant_for_it.add((one.arena.pid, one.sig))
        _go_on(early)
        _wait([one for one in early if one.problem is None])
        _read(parts)
    # Before anything else: the next group uses the same frames.
    _put_back([one for one in runs if one.problem is None])
    for pid, sig in meant_for_it:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sig)
    return [one.answer for one in runs]


def _put_back(runs: Sequence[_Run]) -> None:
    burst = PtraceBurst()
    for one in runs:
        # The mask first, as `Task.put_back` has it.
        burst.set_sigmask(one.task.tid, one.task.sigmask)
        burst.set_registers(one.task.tid, one.task.registers)
    results = burst.run()
    for index, one in enumerate(runs):
        if any(results[2 * index : 2 * index + 2]):
            one.problem = TargetGone(one.task.tid)
        else:
            one.task.disturbed = False


def _write(parts: Sequence[Sequence[_Run]]) -> None:
    """Write the frames and tables of the tasks of each arena."""
    burst = VmBurst()
    for runs in parts:
        frames = b"".join(
            one.frame.ljust(len(one.frame) + -len(one.frame) % _ALIGN) for one in runs
        )
        tables = b"".join(one.batch for one in reversed(runs))
        pieces = [(runs[0].frame_at, frames), (runs[-1].table_at, tables)]
        burst.write(runs[0].arena.pid, pieces)
    _note_problems(parts, burst)


def _read(parts: Sequence[Sequence[_Run]]) -> None:
    """Read the tables of the tasks of each arena."""
    burst = VmBurst()
    views = []
    for runs in parts:
        first, end = runs[-1].table_at, runs[0].table_at + len(runs[0].batch)
        views.append(burst.read(runs[0].arena.pid, first, end - first))
    _note_problems(parts, burst)
    for runs, view in zip(parts, views, strict=True):
        for one in runs:
            at = one.table_at - runs[-1].table_at
            one.batch = bytes(view[at : at + len(one.batch)])


def _note_problems(parts: Sequence[Sequence[_Run]], burst: VmBurst) -> None:
    for runs, problem in zip(parts, burst.move(), strict=True):
        for one in runs:
            one.problem = one.problem or problem


def _start(runs: Sequence[_Run]) -> list[_Run]:
    """Let tasks run; return those that do."""
    burst = PtraceBurst()
    for one in runs:
        task = one.task
        registers = arch.batch_registers(
            task.registers,
            one.arena.base,
            one.table_at,
            len(one.layout.calls),
            one.arena.tgid,
            task.inner,
            one.sig,
            one.frame_at,
        )
        task.will_run()
        # The registers first: if we are killed in between, nothing stays blocked.
        burst.set_registers(task.tid, registers)
        burst.set_sigmask(task.tid, ALL_SIGNALS & ~(1 << (one.sig - 1)))
        burst.cont(task.tid)
    results = burst.run()
    for index, one in enumerate(runs):
        if any(results[3 * index : 3 * index + 3]):
            one.problem = TargetGone(one.arena.pid)
    return [one for one, result in zip(runs, results[2::3], strict=True) if result == 0]


def _go_on(runs: Sequence[_Run]) -> None:
    for one in runs:
        try:
            ptrace.cont(one.task.tid)
        except CkptError as error:
            one.problem = error


def _wait(runs: Iterable[_Run]) -> None:
    """Wait until all have stopped; those that did not stop well have a problem."""
    running = {one.task.tid: one for one in runs}
    waiting = Waiting(running)
    while running:
        for tid, word in waiting.wait(running).items():
            if _has_stopped(running[tid], word):
                del running[tid]


def _has_stopped(one: _Run, word: int | None) -> bool:
    """Tell whether a task is where it should be, or will never be; else let it go on."""
    tid = one.task.tid
    try:
        if word is None:
            raise TargetGone(tid)
        if word != one.mark and not one.task.is_at(one.sig, ptrace.parse_wait_status(tid, word)):
            ptrace.cont(tid)
            return False
    except CkptError as error:
        one.problem = error
    return True
