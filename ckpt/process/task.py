"""One stopped thread: what it was doing when we stopped it, and single calls made in its name.

The state at the stop (`registers`, `sigmask`) is read once, when the freezer has stopped the
thread, and is what the thread gets back, whatever ran in between. `freezer.py` makes these,
`arena.py` runs batches on them.
"""

import os
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import attrs

from ckpt.errors import TargetDamaged, TargetGone
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.arch.x86_64_cpuid import xsave_bytes
from ckpt.kernel.procfs import maps
from ckpt.kernel.procfs.files import decode, read_bytes
from ckpt.kernel.procfs.status import Status, parse_status
from ckpt.kernel.ptrace_burst import PtraceBurst
from ckpt.process import memory
from ckpt.process.remote import Call, Reply
from ckpt.process.tree import has_ended
from ckpt.units import Pid, RemoteAddr, Tid, addr_range

ALL_SIGNALS = 0xFFFF_FFFF_FFFF_FFFF
_SIGSTOP = 19
SYSCALL_STOP = 5 | 0x80
"""How a stop in a system call reads under TRACESYSGOOD: SIGTRAP with a bit that is no signal's."""
_FAULTS = (4, 7, 8, 11)
"""SIGILL, SIGBUS, SIGFPE, SIGSEGV: the kernel forces them, blocked or not."""
_RSEQ_CS_OFFSET = 8
_RSEQ_CS = struct.Struct("<IIQQQ")
_ENDINGS = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)
_SPIN_S = 0.002
_NAP_S = 0.0002


def look_at(tid: Tid, *, reap: bool) -> ptrace.WaitStatus | None:
    """Return what has become of a traced thread, None if nothing yet.

    Args:
        tid: the thread.
        reap: whether its end may be taken from whoever else would wait for it: its parent, if that
            is this process too.

    Raises:
        TargetGone: we are not (any more) the tracer or the parent.
    """
    if not reap:
        options = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        try:
            seen = os.waitid(os.P_PID, tid, options)
        except ChildProcessError:
            raise TargetGone(tid) from None
        if seen is None:
            return None
        if seen.si_code in _ENDINGS:
            return ptrace.WaitStatus(tid, ptrace.Kind.EXITED, 0)
    return ptrace.wait(tid, block=False)


@attrs.define(slots=True, eq=False, repr=False)
class Task:
    """A thread that is stopped under our ptrace."""

    tid: Tid
    """As we see it."""
    inner: Tid = attrs.field(default=attrs.Factory(lambda task: task.tid, takes_self=True))
    """As it sees itself, in its own pid namespace."""
    group_stopped: int = 0
    """The stop signal if it was in group-stop (SIGSTOP, SIGTSTP, ...), else 0."""
    registers: arch.Registers = attrs.field(factory=arch.Registers)
    """As the thread gets them back; of a restartable sequence: its abort handler."""
    sigmask: int = 0
    rseq: ptrace.RseqConfiguration | None = None
    reserved: int = 0
    """Signals that must not mark the end of a batch, since batches have queued them; a mask."""
    disturbed: bool = False
    """Registers or mask in the kernel are not its own at this moment."""
    mended: bool = False
    """`interrupted.mend` was done, which must not be done twice."""
    deferred_stop: bool = False
    """A SIGSTOP came while a remote call ran; it is sent again at the thaw."""
    made: list[Tid] = attrs.field(factory=list)
    """Threads and processes that its remote calls have made, in their order."""
    _xstate: arch.Xstate | None = None
    _status: bytes | None = None
    _parsed: tuple[bytes, Status] | None = None
    _maps: list[str] | None = None

    def read_state(self) -> None:
        """Read registers, mask and rseq; before the first remote call, which would change them."""
        self.registers = ptrace.get_registers(self.tid)
        self.sigmask = ptrace.get_sigmask(self.tid)
        self.rseq = ptrace.get_rseq_configuration(self.tid)
        if self.rseq is not None:
            self._leave_critical_section(self.rseq)

    def take_state(
        self,
        registers: arch.Registers,
        sigmask: int,
        rseq: ptrace.RseqConfiguration | None,
        xstate: arch.Xstate,
    ) -> None:
        """Take what `StateReading` has read in its stead; it is in no critical section."""
        self.registers, self.sigmask, self.rseq, self._xstate = registers, sigmask, rseq, xstate

    @property
    def xstate(self) -> arch.Xstate:
        """The whole XSAVE area, read once: remote calls do not change it."""
        if self._xstate is None:
            self._xstate = ptrace.get_xstate(self.tid)
        return self._xstate

    @property
    def status_text(self) -> bytes:
        """Its /proc/PID/status, read once for as long as it stands still.

        That remains true but for signals that come.
        """
        if self._status is None:
            self._status = read_bytes(self.tid, "status")
        return self._status

    @status_text.setter
    def status_text(self, text: bytes) -> None:
        self._status = text

    @property
    def status(self) -> Status:
        """The same, parsed."""
        text = self.status_text
        if self._parsed is None or self._parsed[0] is not text:
            self._parsed = text, parse_status(decode(text))
        return self._parsed[1]

    @property
    def maps_lines(self) -> list[str]:
        """The lines of its /proc/PID/maps, read once for as long as it stands still.

        To be relied on only while all threads of the process do.
        """
        if self._maps is None:
            self._maps = maps.read_lines(self.tid)
        return self._maps

    def _leave_critical_section(self, rseq: ptrace.RseqConfiguration) -> None:
        # The kernel aborts a critical section that was stopped, on the way back to user space
        # (kernel/rseq.c). A remote call would take that way with other registers: the kernel would
        # clear the pointer and the section would go on as if it had never been left.
        pid = self.tid
        (section,) = struct.unpack(
            "<Q", memory.read(pid, RemoteAddr(rseq.pointer + _RSEQ_CS_OFFSET), 8)
        )
        if not section:
            return
        raw = memory.read(pid, RemoteAddr(section), _RSEQ_CS.size)
        _version, _flags, start, length, abort = _RSEQ_CS.unpack(raw)
        if start <= self.registers.rip < start + length:
            self.registers.rip = abort

    def put_back(self) -> None:
        """Give the thread its own registers and mask again."""
        if self.disturbed:
            # The mask first: if we are killed in between, what it runs next gives back both.
            ptrace.set_sigmask(self.tid, self.sigmask)
            ptrace.set_registers(self.tid, self.registers)
            self.disturbed = False

    def prepare_to_run(self, registers: arch.Registers, sigmask: int) -> None:
        """Set what the thread runs next; `put_back` undoes it."""
        self.will_run()
        # The registers first: if we are killed in between, nothing stays blocked.
        ptrace.set_registers(self.tid, registers)
        ptrace.set_sigmask(self.tid, sigmask)

    def will_run(self) -> None:
        """Note that it runs code of ours next."""
        self.disturbed = True
        self._status = self._maps = None

    def wait_for(self, sig: int, *, to_syscall: bool = False) -> None:
        """Wait until the thread, which runs our code, stops with `sig`.

        Threads or processes that it makes meanwhile (clone events) are noted in `made`.

        Raises:
            TargetGone: it ended (SIGKILL, a group exit).
        """
        while not self.is_at(sig, self._wait()):
            if to_syscall:
                ptrace.cont_to_syscall(self.tid)
            else:
                ptrace.cont(self.tid)

    def is_at(self, sig: int, status: ptrace.WaitStatus) -> bool:
        """Tell whether a thread that runs our code has stopped with `sig`; else it must go on.

        Raises:
            TargetGone: it ended.
            TargetDamaged: our code in it failed.
        """
        if status.gone:
            raise TargetGone(self.tid)
        if status.kind is ptrace.Kind.SIGNAL:
            if status.sig == sig:
                return True
            if status.sig in _FAULTS:
                raise TargetDamaged(self.tid, f"our code in it faulted (signal {status.sig})")
            # Everything that can be blocked is; what is left is SIGSTOP.
            self.deferred_stop |= status.sig == _SIGSTOP
        elif status.kind is ptrace.Kind.EVENT:
            self.made.append(Tid(ptrace.get_event_message(self.tid)))
        return False

    def _wait(self) -> ptrace.WaitStatus:
        """Wait for the next stop, or the end.

        Not in the kernel: if the whole process is killed, the end of its first thread is told only
        after ours of all others is seen.
        """
        spin_until_s = time.monotonic() + _SPIN_S
        while (status := look_at(self.tid, reap=False)) is None:
            if time.monotonic() < spin_until_s:
                os.sched_yield()
            elif has_ended(Pid(self.tid)):
                raise TargetGone(self.tid)
            else:
                time.sleep(_NAP_S)
        return status

    def run_single(
        self, insn: RemoteAddr, nr: NR, *args: int, frame_at: RemoteAddr | None = None
    ) -> Reply:
        """Run one system call by the `syscall` instruction at `insn`.

        For processes that we make, and where a batch cannot mark its end. About 0.06 ms.
        It stops at entry and exit of the call: a single step would end in a SIGTRAP that the kernel
        forces, and that would undo the target's own action for it. The task has its own registers
        again afterwards: only for the length of the call it would not survive our end, unless code
        behind `insn` leads to a signal frame at `frame_at` (`arch.single_call_registers`).
        """
        registers = arch.single_call_registers(self.registers, insn, nr, args, frame_at)
        self.prepare_to_run(registers, ALL_SIGNALS)
        for _ in ("entry", "exit"):
            ptrace.cont_to_syscall(self.tid)
            self.wait_for(SYSCALL_STOP, to_syscall=True)
        reply = Reply(Call(nr, args), arch.result_of(ptrace.get_registers(self.tid)))
        self.put_back()
        return reply


class StateReading:
    """What `Task.read_state` reads, of many threads in one go; laid out before they are stopped."""

    def __init__(self, tids: Iterable[Tid]) -> None:
        """Lay out the requests."""
        self._burst = PtraceBurst()
        xstate_bytes = _count_xstate_bytes()
        self._answers = {
            tid: (
                self._burst.get_registers(tid),
                self._burst.get_sigmask(tid),
                self._burst.get_xstate(tid, xstate_bytes),
                self._burst.get_rseq_configuration(tid),
            )
            for tid in tids
        }

    def read(self, tasks: Mapping[Tid, Task]) -> None:
        """Read the states of the stopped threads of one process.

        To be called once: the threads keep what was read where it is.

        Raises:
            TargetGone: one of them ended.
        """
        results = self._burst.run()
        rseqs: dict[Tid, ptrace.RseqConfiguration | None] = {}
        for index, (tid, answer) in enumerate(self._answers.items()):
            of_registers, of_mask, of_xstate, of_rseq = results[4 * index : 4 * index + 4]
            if tid in tasks and of_registers == of_mask == of_xstate == 0 <= of_rseq:
                rseqs[tid] = ptrace.parse_rseq_configuration(answer[3])
        sections = _read_sections(next(iter(tasks)), rseqs)
        for tid, task in tasks.items():
            if sections.get(tid, 1):
                # Something is out of the way, or the thread is new: it is read for itself.
                task.read_state()
            else:
                registers, sigmask, xstate, _ = self._answers[tid]
                task.take_state(registers, sigmask.value, rseqs[tid], xstate)


@lru_cache(maxsize=1)
def _count_xstate_bytes() -> int:
    """Return the size of the XSAVE area of any thread; 0: it is asked of each thread."""
    try:
        return xsave_bytes()
    except OSError:
        return 0


def read_states(tasks: Sequence[Task]) -> None:
    """Do `read_state` for many threads of one process.

    Raises:
        TargetGone: one of them ended.
    """
    StateReading(task.tid for task in tasks).read({task.tid: task for task in tasks})


def _read_sections(
    reader: Tid, rseqs: Mapping[Tid, ptrace.RseqConfiguration | None]
) -> dict[Tid, int]:
    """Return the pointer to the critical section of each thread; 0: it is in none."""
    known = {tid: rseq for tid, rseq in rseqs.items() if rseq}
    spans = [addr_range(RemoteAddr(r.pointer + _RSEQ_CS_OFFSET), 8) for r in known.values()]
    try:
        words = struct.unpack(f"<{len(spans)}Q", memory.read_ranges(reader, spans))
    except TargetGone:
        # One of them is where no memory is: each for itself.
        return {}
    return dict.fromkeys(rseqs, 0) | dict(zip(known, words, strict=True))
