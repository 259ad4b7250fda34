"""Single system calls of many stopped threads at the same time, without code of ours.

For one there is `Task.run_single`. Of many, each would wait for the scheduler after the other. Here
all are started before the first is waited for, and each has its own registers again as soon as its
call has returned. From start to there only those survive our end that have a `WayBack`.
"""

from collections.abc import Mapping, Sequence

import attrs

from ckpt.errors import CkptError, TargetGone
from ckpt.kernel import ptrace
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.ptrace_burst import PtraceBurst
from ckpt.process.remote import Call, Reply
from ckpt.process.task import ALL_SIGNALS, SYSCALL_STOP, Task
from ckpt.process.waiting import Waiting
from ckpt.process.way_back import WayBack, laid
from ckpt.units import RemoteAddr, Tid

_SYSCALL_WORD = ptrace.word_of_stop(SYSCALL_STOP)


@attrs.frozen(slots=True, repr=False)
class Single:
    """A call that a thread shall make by the `syscall` instruction at `insn`."""

    task: Task
    insn: RemoteAddr
    call: Call
    """Its arguments are plain numbers."""
    way: WayBack | None = None
    """Instead of `insn`, where it can be relied on."""


@attrs.define(slots=True, eq=False, repr=False)
class _Run:
    """One under way."""

    single: Single
    is_inside: bool = False
    """It has stopped at the entry of the call; the next stop is behind it."""
    result: Reply | CkptError | None = None

    @property
    def task(self) -> Task:
        return self.single.task

    def arrives(self, word: int | None) -> bool:
        """Tell whether it has stopped at entry or exit; else it must go on, or has a result."""
        try:
            if word is None:
                raise TargetGone(self.task.tid)
            return word == _SYSCALL_WORD or self.task.is_at(
                SYSCALL_STOP, ptrace.parse_wait_status(self.task.tid, word)
            )
        except CkptError as error:
            self.result = error
            return False


def run_singles(singles: Sequence[Single]) -> list[Reply | CkptError]:
    """Let each thread make its call, all of them at once; they have their own state afterwards.

    What /proc showed of a thread before is still believed of it: these calls make and remove what
    is ours.

    Returns:
        of each, in the order of `singles`: the reply, or TargetGone or TargetDamaged if there is
        none.
    """
    runs = {one.task.tid: _Run(one) for one in singles}
    with laid([one.way for one in singles if one.way]) as ways:
        _run(runs, ways)
    return [one.result for one in runs.values() if one.result is not None]


def _run(runs: Mapping[Tid, _Run], ways: Mapping[Tid, WayBack]) -> None:
    _start(runs, ways)
    waiting = Waiting(runs)
    while running := {tid: one for tid, one in runs.items() if one.result is None}:
        returned, going_on = list[_Run](), PtraceBurst()
        for tid, word in waiting.wait(running).items():
            one = running[tid]
            if one.arrives(word) and one.is_inside:
                returned.append(one)
            elif one.result is None:
                one.is_inside |= word == _SYSCALL_WORD
                going_on.cont_to_syscall(tid)
        _take_back(returned)
        going_on.run()


def _start(runs: Mapping[Tid, _Run], ways: Mapping[Tid, WayBack]) -> None:
    burst = PtraceBurst()
    for tid, one in runs.items():
        task, asked = one.task, one.single.call
        numbers = tuple(word for word in asked.args if isinstance(word, int))
        way = ways.get(tid)
        insn, frame_at = (way.call_at, way.frame_at) if way else (one.single.insn, None)
        registers = arch.single_call_registers(task.registers, insn, asked.nr, numbers, frame_at)
        task.disturbed = True
        # The registers first: if we are killed in between, nothing stays blocked.
        burst.set_registers(tid, registers)
        burst.set_sigmask(tid, ALL_SIGNALS)
        burst.cont_to_syscall(tid)
    for (tid, one), result in zip(runs.items(), burst.run()[2::3], strict=True):
        if result != 0:
            one.result = TargetGone(tid)


def _take_back(runs: Sequence[_Run]) -> None:
    """Take the results of those whose calls have returned, and give them their own state."""
    burst = PtraceBurst()
    registers = []
    for one in runs:
        task = one.task
        registers.append(burst.get_registers(task.tid))
        # The mask first, as `Task.put_back` has it.
        burst.set_sigmask(task.tid, task.sigmask)
        burst.set_registers(task.tid, task.registers)
    results = burst.run()
    for index, one in enumerate(runs):
        if any(results[3 * index : 3 * index + 3]):
            one.result = TargetGone(one.task.tid)
        else:
            one.task.disturbed = False
            one.result = Reply(one.single.call, arch.result_of(registers[index]))
