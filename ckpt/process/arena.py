"""The arena: a small mapping in the target for code and data of remote system calls.

    +0       code                     the loop of `arch.BATCH_CODE`; at +512 what else is run
    +1 page  signal frame             the way back for a task whose tracer has died
    +5 pages table and memory         the calls of one batch, their arguments, their results

A batch costs two stops, however many calls it has. While it runs, every signal is blocked but one
that does nothing by default and has no handler in the target: the loop ends by sending that to
itself. Traced, it is our stop. If we were killed meanwhile, it is nothing, and the next
instruction, rt_sigreturn on the prepared frame, gives the task its own registers back. The mapping
is left behind then; nobody is there to remove it.

It lies apart from every mapping of the target (`choose_place`). The kernel would merge it with a
neighbour of the same kind, and a merged mapping counts as written as a whole (soft-dirty bits).

The mapping is made and removed by single calls through a `syscall` instruction of the target
(`run_singles`), from which a task finds back by `way_back.py`. One that has no such way is astray
if we are killed in one of the two: windows of some 0.05 ms each.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import attrs

from ckpt.errors import CkptError, HostFull, TargetGone
from ckpt.kernel import process_vm, ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.procfs import maps, status
from ckpt.kernel.procfs.files import read_bytes
from ckpt.kernel.vm_burst import VmBurst
from ckpt.process import memory
from ckpt.process.remote import Call, Reply, call, pack_batch, size_of, unpack_replies
from ckpt.process.singles import Single, run_singles
from ckpt.process.task import ALL_SIGNALS, Task
from ckpt.process.uninterrupted import uninterrupted
from ckpt.process.way_back import WayBack, find_way_back
from ckpt.units import AddrRange, Pid, RemoteAddr, addr_range

_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, MAP_FIXED_NOREPLACE = 0x02, 0x10, 0x20, 0x100000

_SIGURG, _SIGCHLD, _SIGWINCH = 23, 17, 28
FRAME_PAGES = 4
_DATA_OFFSET = arch.PAGE_SIZE * (1 + FRAME_PAGES)
ARENA_SIZE = arch.PAGE_SIZE * 80
"""Bytes of the whole mapping; only the pages that a batch needs are ever touched."""
_CODE_OFFSET = 512
_APART = 1 << 20
"""Bytes between an arena and its neighbours; a mapping that grows down keeps as many free."""


def find_syscall_insn(pid: Pid, vmas: Sequence[maps.Vma]) -> RemoteAddr:
    """Return the address of a `syscall` instruction in the target's executable memory.

    The vdso has one (the fallback of clock_gettime); else any executable mapping is searched.

    Raises:
        TargetGone: the process ended.
        HostFull: there is none (a target without vdso and without libc).
    """
    executable = [vma for vma in vmas if vma.executable and vma.readable]
    executable.sort(key=lambda vma: vma.path != "[vdso]")
    for vma in executable:
        code = memory.read(pid, vma.span.start, vma.span.len_bytes)
        at = code.find(arch.SYSCALL_INSN)
        if at >= 0:
            return RemoteAddr(vma.span.start + at)
    if not vmas:
        # A process that ends loses its mappings before it is seen to have ended.
        raise TargetGone(pid)
    raise HostFull(f"process {pid} has no syscall instruction", "nothing can be asked inside it")


def choose_end_mark(task: Task, status_text: bytes | None = None) -> int | None:
    """Return a signal that this task would not notice: ignored by default, no handler, not queued.

    One that it blocks, as many threads do with all signals, is the second choice: it may wait for
    it with sigwait or signalfd, so it must not stay queued. It is sent to this thread alone,
    unblocked for the length of the batch; our stop takes it off the queue, or, where we are gone,
    the kernel ignores it.
    None if the target has handlers for all of them.

    Args:
        task: the task.
        status_text: its /proc/PID/status; None: read it now.
    """
    now = status.parse_signal_masks(status_text or read_bytes(task.tid, "status"))
    used = now.caught | now.pending | now.shared_pending | task.reserved
    harmless = [sig for sig in (_SIGWINCH, _SIGURG, _SIGCHLD) if not used >> (sig - 1) & 1]
    return min(harmless, key=lambda sig: task.sigmask >> (sig - 1) & 1, default=None)


@attrs.define(slots=True, eq=False, repr=False)
class Arena:
    """A mapping of ours in a stopped process; runs batches on its tasks."""

    pid: Pid
    tgid: int
    """The process's pid as it sees it itself (its own pid namespace)."""
    base: RemoteAddr
    insn: RemoteAddr
    """A `syscall` instruction of the target."""
    size: int = ARENA_SIZE
    way: WayBack | None = None
    """From the call that unmaps it, for the thread that has mapped it."""

    @property
    def span(self) -> AddrRange:
        """Its addresses."""
        return addr_range(self.base, self.size)

    def run(self, task: Task, calls: Sequence[Call]) -> list[Reply]:
        """Run `calls` in the name of `task`, in their order; replies in the same order.

        A call that fails does not end the batch. Tasks that the calls make are in `task.made`.
        """
        replies: list[Reply] = []
        sig = choose_end_mark(task)
        room = self.size - _DATA_OFFSET
        part: list[Call] = []
        used = 0
        for asked in calls:
            need = size_of(asked)
            if need > room:
                raise ValueError(f"{asked} needs {need} bytes, the arena has {room}")
            if used + need > room:
                replies += self._run_part(task, part, sig)
                part, used = [], 0
            part.append(asked)
            used += need
        if part:
            replies += self._run_part(task, part, sig)
        return replies

    def _run_part(self, task: Task, calls: list[Call], sig: int | None) -> list[Reply]:
        at = RemoteAddr(self.base + _DATA_OFFSET)
        batch = pack_batch(calls, at)
        memory.write(self.pid, at, batch)
        if sig is None:
            return self._step(task, calls, batch)
        self._run_to_mark(task, self.base, at, len(calls), sig)
        return unpack_replies(calls, memory.read(self.pid, at, len(batch)))

    def run_code(self, task: Task, code: bytes) -> int:
        """Run code that leaves a word where rbx points and ends like `arch.BATCH_CODE`.

        Returns:
            The word, signed; 0 if the code left none, or if this task uses every signal that could
            mark the end.
        """
        sig = choose_end_mark(task)
        if sig is None:
            return 0
        code_at = RemoteAddr(self.base + _CODE_OFFSET)
        at = RemoteAddr(self.base + _DATA_OFFSET)
        memory.write(self.pid, code_at, code)
        memory.write(self.pid, at, bytes(8))
        self._run_to_mark(task, code_at, at, 0, sig)
        return int.from_bytes(memory.read(self.pid, at, 8), "little", signed=True)

    def _run_to_mark(
        self, task: Task, code: RemoteAddr, table: RemoteAddr, n_calls: int, sig: int
    ) -> None:
        frame_at = self._write_frame(task)
        registers = arch.batch_registers(
            task.registers, code, table, n_calls, self.tgid, task.inner, sig, frame_at
        )
        task.prepare_to_run(registers, ALL_SIGNALS & ~(1 << (sig - 1)))
        ptrace.cont(task.tid)
        task.wait_for(sig)
        # Before anything else: the next batch, maybe of another task, uses the same frame.
        task.put_back()

    def _write_frame(self, task: Task) -> RemoteAddr:
        at = RemoteAddr(self.base + arch.PAGE_SIZE)
        frame = arch.signal_frame(task.registers, task.xstate, task.sigmask, at)
        memory.write(self.pid, at, frame)
        return at

    def _step(self, task: Task, calls: list[Call], batch: bytes) -> list[Reply]:
        """Run a batch call by call, for a target that uses every signal that could end the loop."""
        frame_at = self._write_frame(task)
        insn = RemoteAddr(self.base + arch.HEALING_CALL)
        values = [
            task.run_single(
                insn, asked.nr, *arch.unpack_args(batch, index), frame_at=frame_at
            ).value
            for index, asked in enumerate(calls)
        ]
        at = RemoteAddr(self.base + _DATA_OFFSET)
        after = memory.read(self.pid, at, len(batch))
        replies = unpack_replies(calls, after)
        return [
            attrs.evolve(reply, value=value) for reply, value in zip(replies, values, strict=True)
        ]


def map_arena(task: Task, insn: RemoteAddr, at: RemoteAddr | None = None) -> RemoteAddr:
    """Map an arena (at `at`, where nothing may be, or anywhere) and write its code.

    Raises:
        HostFull: the kernel has no room for it (address space limit, memory).
        TargetGone: the process ended.
    """
    (mapped,) = _map_each([_Place(task, insn, at)])
    if isinstance(mapped, CkptError):
        raise mapped
    return mapped


@attrs.frozen(slots=True, repr=False)
class _Place:
    """Of an arena: who maps it, and where."""

    task: Task
    insn: RemoteAddr
    """A `syscall` instruction."""
    at: RemoteAddr | None
    """None: anywhere."""
    way: WayBack | None = None

    def single(self, asked: Call) -> Single:
        """Return a call of the thread that maps it."""
        return Single(self.task, self.insn, asked, self.way)


def _map_each(places: Sequence[_Place]) -> list[RemoteAddr | CkptError]:
    """Map arenas in many processes, all at once; return where they are, or why they are not."""
    # All of it in one call, so that the target waits for one call less.
    prot = _PROT_READ | _PROT_WRITE | _PROT_EXEC
    replies = run_singles([_plan_mapping(place, prot) for place in places])
    code = VmBurst()
    for place, reply in zip(places, replies, strict=True):
        if isinstance(reply, Reply) and reply.ok:
            code.write(Pid(place.task.tid), [(RemoteAddr(reply.value), arch.BATCH_CODE)])
    problems = iter(code.move())
    mapped: list[RemoteAddr | CkptError] = []
    for place, reply in zip(places, replies, strict=True):
        if isinstance(reply, CkptError):
            mapped.append(reply)
        elif not reply.ok:
            mapped.append(_map_in_two(place))
        else:
            mapped.append(next(problems) or RemoteAddr(reply.value))
    return mapped


def _plan_mapping(place: _Place, prot: int) -> Single:
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | (MAP_FIXED_NOREPLACE if place.at else 0)
    return place.single(call(NR.mmap, place.at or 0, ARENA_SIZE, prot, flags, -1, 0))


def _map_in_two(place: _Place) -> RemoteAddr | CkptError:
    """Map an arena where memory cannot be had that is writable and executable."""
    (reply,) = run_singles([_plan_mapping(place, _PROT_READ | _PROT_WRITE)])
    if isinstance(reply, CkptError):
        return reply
    if not reply.ok:
        return HostFull(
            f"no room for {ARENA_SIZE // 1024} KiB in process {place.task.tid} ({reply})",
            "raise its limit of address space (RLIMIT_AS), or free memory",
        )
    base = RemoteAddr(reply.value)
    return _map_code_unwritable(place, base) or base


def _map_code_unwritable(place: _Place, base: RemoteAddr) -> CkptError | None:
    """Map the code of an arena in a process that may not write what it runs (PR_SET_MDWE).

    Memory that is executable from the start may be had, and a tracer may write what the process
    may not. Returns why not.
    """
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED
    prot = _PROT_READ | _PROT_EXEC
    mapping = call(NR.mmap, base, arch.PAGE_SIZE, prot, flags, -1, 0)
    (reply,) = run_singles([place.single(mapping)])
    if isinstance(reply, CkptError):
        return reply
    code, tid = arch.BATCH_CODE, place.task.tid
    if reply.ok and process_vm.write_mem(tid, [(int(base), 0, len(code))], code) == len(code):
        return None
    run_singles([place.single(call(NR.munmap, base, ARENA_SIZE))])
    return HostFull(
        f"process {tid} may have no executable memory for our code ({reply})",
        "a security module, or PR_SET_MDWE, forbids it",
    )


def choose_place(vmas: Sequence[maps.Vma], n_others: int = 0) -> RemoteAddr | None:
    """Return addresses for an arena in the widest hole below a mapping, None if all are narrow.

    Args:
        vmas: all mappings of the process, ascending.
        n_others: how many arenas will be there before it.
    """
    holes = [
        (above.span.start - below.span.end, above.span.start)
        for below, above in pairwise(vmas)
        if above.span.end <= arch.USER_END  # the vsyscall page is the kernel's
    ]
    width, end = max(holes, default=(0, 0))
    needed = (n_others + 1) * (_APART + ARENA_SIZE)
    return RemoteAddr(end - needed) if width >= needed + _APART else None


@contextlib.contextmanager
def arena(pid: Pid, tgid: int, task: Task) -> Iterator[Arena]:
    """Lend an arena in the stopped process `pid`; gone again on the way out, whatever happened."""
    with arenas([(pid, tgid, task)]) as (lent,):
        yield lent


@contextlib.contextmanager
def arenas(
    wanted: Sequence[tuple[Pid, int, Task]], of_memory: Mapping[Pid, Pid] | None = None
) -> Iterator[list[Arena]]:
    """Lend an arena in each of these stopped processes; all are made, and removed, at once.

    Args:
        wanted: of each process: its pid, its pid as it sees it itself, a thread that makes the
            calls.
        of_memory: of those that share memory, whose that is: there each has an arena too.

    Raises:
        HostFull, TargetGone: of the first process that cannot have one; none is left in any.
    """
    places: list[_Place] = []
    n_arenas: dict[Pid, int] = {}
    for pid, _, task in wanted:
        owner = (of_memory or {}).get(pid, pid)
        n_others = n_arenas.get(owner, 0)
        n_arenas[owner] = n_others + 1
        places.append(_find_place(task, n_others))
    with uninterrupted():
        lent: list[Arena] = []
        try:
            problem = None
            for (pid, tgid, _), place, base in zip(wanted, places, _map_each(places), strict=True):
                if isinstance(base, CkptError):
                    problem = problem or base
                else:
                    lent.append(Arena(pid, tgid, base, place.insn, way=place.way))
            if problem is not None:
                raise problem
            yield lent
        finally:
            _unmap_each(lent, {pid: task for pid, _, task in wanted})


def _find_place(task: Task, n_others: int) -> _Place:
    vmas = maps.parse_lines(task.maps_lines)
    way = find_way_back(task, vmas)
    insn = way.call_at if way else find_syscall_insn(Pid(task.tid), vmas)
    return _Place(task, insn, choose_place(vmas, n_others), way)


def _unmap_each(lent: Sequence[Arena], tasks: Mapping[Pid, Task]) -> None:
    # One that has ended has none.
    run_singles(
        [
            Single(tasks[one.pid], one.insn, call(NR.munmap, one.base, ARENA_SIZE), one.way)
            for one in lent
        ]
    )
