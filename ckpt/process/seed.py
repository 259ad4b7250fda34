"""The seed: the tiny program that a restore starts and turns into the restored process.

    seed                    a few instructions, our child, with all open files of the image
     └ clone3(set_tid) ──>  embryo of the root: the same, with its pid of the image; also our child
        └ clone3(set_tid)   the embryos of its children, and so on

The seed dies with us by its parent-death signal, which a fork does not inherit. The embryos are
under our ptrace from their first instant and die with us (PTRACE_O_EXITKILL) until they are let go.
So a restore that fails, or is killed, leaves nothing behind.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import attrs

from ckpt.errors import NotPermitted, RestoreFailed, TargetGone
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.clone3 import (
    CLONE_ARGS_SIZE_VER1,
    CloneFlag,
    clone_args,
    pack_clone_args,
    pack_set_tid,
)
from ckpt.kernel.prctl import adopting_orphans
from ckpt.process import memory
from ckpt.process.arena import Arena, map_arena
from ckpt.process.holder import taken
from ckpt.process.pid_space import PidSpace
from ckpt.process.programs import CODE_AT, spawn
from ckpt.process.remote import Call, In, Reply, call
from ckpt.process.task import Task
from ckpt.process.tree import list_tids
from ckpt.units import AddrRange, Fd, Pid, RemoteAddr, Tid

NAME = "ckpt-seed"
_OPTIONS = (
    ptrace.Option.EXITKILL
    | ptrace.Option.TRACECLONE
    | ptrace.Option.TRACEFORK
    | ptrace.Option.TRACESYSGOOD
)
SYSCALL_AT = RemoteAddr(CODE_AT + arch.BIND_CODE.index(arch.SYSCALL_INSN))
"""The first that `spawn` puts into a program that dies with us."""
_EEXIST = 17
_WALL = 0x4000_0000
"""__WALL (wait.h): also what does not tell its end by SIGCHLD."""
_ALL_ITS_OWN = CloneFlag(0)
_NO_ARENA = Arena(Pid(0), 0, RemoteAddr(0), RemoteAddr(0), 0)


@attrs.frozen(slots=True, repr=False)
class ClockOffsets:
    """What a time namespace adds to the host's clocks, in nanoseconds (time_namespaces(7))."""

    monotonic_ns: int
    boottime_ns: int


@attrs.define(slots=True, eq=False, repr=False)
class Embryo:
    """A process under construction: the right pid, our arena, and soon the image's memory."""

    pid: Pid
    """As we see it."""
    number: Pid
    """As the image and the tree itself know it; another one in a pid namespace of its own."""
    leader: Task
    tasks: dict[Tid, Task]
    """By their numbers in the image."""
    arena: Arena
    maker: Pid | None = None
    """Of whose memory it was made a clone, if that is one of the tree."""
    leads_session: bool = False
    """It has made one of its own."""
    has_memory: bool = False
    """It has what the image says: whoever it makes is born with that."""

    @property
    def reachable_as(self) -> Pid:
        """By which we can ask about it: another than `pid` when its first thread has ended."""
        return Pid(self.leader.tid)

    def run(self, calls: list[Call], task: Task | None = None) -> list[Reply]:
        """Run a batch in the name of `task` (the leader by default)."""
        return self.arena.run(task or self.leader, calls)

    def run_checked(self, step: str, calls: list[Call], task: Task | None = None) -> list[Reply]:
        """Run a batch of which every call must succeed.

        Raises:
            RestoreFailed: the kernel refused one; `step` says in which part of the restore.
        """
        replies = self.run(calls, task)
        for reply in replies:
            if not reply.ok:
                raise RestoreFailed(step, str(reply))
        return replies


@attrs.define(slots=True, eq=False, repr=False)
class Nursery:
    """All embryos of a tree; those that have not been let go end if the restore fails."""

    embryos: dict[Pid, Embryo] = attrs.field(factory=dict)
    """By their numbers in the image; each behind its parent."""
    seen_as: dict[int, Pid] = attrs.field(factory=dict)
    """Number in the image -> the one that we see; those that have ended included."""

    @property
    def root(self) -> Embryo:
        """The first, which all others descend from."""
        return next(iter(self.embryos.values()))

    def bear(
        self, parent: Embryo, pid: Pid, exit_signal: int, flags: CloneFlag = _ALL_ITS_OWN
    ) -> Embryo:
        """Let an embryo make a child: of its memory, its descriptors, its session.

        By `flags` they share some of that; with CLONE_PARENT it is made a child of its parent.

        Raises:
            PidTaken: `pid` is in use, or its zombie still waits for a parent.
            RestoreFailed: the kernel refused something else.
        """
        raw = pack_clone_args(flags=flags, n_set_tid=1, exit_signal=exit_signal)
        pointer = (clone_args.set_tid.offset, pack_set_tid([Tid(pid)]))
        (reply,) = parent.run([call(NR.clone3, In(raw, (pointer,)), len(raw))])
        if reply.error == _EEXIST:
            raise taken(pid)
        if not reply.ok:
            raise RestoreFailed(f"making process {pid}", str(reply))
        outer = Pid(parent.leader.made[-1])
        embryo = self.take_in(outer, pid)
        embryo.arena = attrs.evolve(parent.arena, pid=outer, tgid=pid)
        # Of a sister as a rule before she has any other memory than that of their parent.
        is_first = bool(flags & CloneFlag.PARENT) and not parent.has_memory
        embryo.maker = parent.maker if is_first else parent.number
        return embryo

    def take_in(self, pid: Pid, number: Pid) -> Embryo:
        """Take in a process that was just made, and has no arena yet."""
        leader = adopt(Tid(pid), Tid(number))
        self.seen_as[number] = pid
        embryo = Embryo(pid, number, leader, {leader.inner: leader}, _NO_ARENA)
        self.embryos[number] = embryo
        return embryo

    def end(self, pid: Pid) -> None:
        """Kill one that is not needed any more; its parent must still wait for it."""
        end_process(self.embryos.pop(pid).pid)

    def end_all(self) -> None:
        """Kill all, and reap those that become ours with their parents' end."""
        with adopting_orphans():
            for embryo in reversed(self.embryos.values()):
                # One that is gone already must not save the others.
                with contextlib.suppress(TargetGone):
                    end_process(embryo.pid)
            for embryo in self.embryos.values():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(embryo.pid, _WALL)


@contextlib.contextmanager
def plant(
    pid: Pid,
    fds: dict[Fd, Fd],
    offsets: ClockOffsets | None,
    arena_at: AddrRange,
    space: PidSpace | None = None,
) -> Iterator[Nursery]:
    """Start a seed and make the embryo with process id `pid`; kill all embryos if the block fails.

    Args:
        pid: which id the restored root has.
        fds: descriptors that it inherits: number there -> descriptor here.
        offsets: of a new time namespace for it; None: it stays in ours.
        arena_at: addresses that neither the seed nor the image uses, for the arena.
        space: the pid namespace in which it has that id; None: in ours.

    Raises:
        PidTaken: `pid` is in use, or its zombie still waits for a parent.
        RestoreFailed: the kernel refused something else.
    """
    space_at = Fd(max([*fds, 2]) + 1)
    if space is not None and space.fd is not None:
        fds = fds | {space_at: space.fd}
    seed_pid = _spawn_beside(pid, fds)
    nursery = Nursery()
    try:
        seed = take_over(seed_pid)
        if offsets is not None:
            _enter_time_namespace(seed, offsets)
        if space_at in fds:
            _bear_into(seed, space_at)
        is_first = space is not None and space.fd is None
        made = clone(seed, CloneFlag.PARENT | (CloneFlag.NEWPID if is_first else 0), pid)
        root = nursery.take_in(made, pid)
        end_process(seed_pid)
        seed_pid = Pid(0)
        base = map_arena(root.leader, SYSCALL_AT, arena_at.start)
        insn = RemoteAddr(base + arch.BATCH_CODE.index(arch.SYSCALL_INSN))
        root.arena = Arena(made, pid, base, insn)
        yield nursery
    except BaseException:
        nursery.end_all()
        raise
    finally:
        if seed_pid:
            end_process(seed_pid)


def _spawn_beside(wanted: Pid, fds: dict[Fd, Fd]) -> Pid:
    """Start a seed whose own pid is not the one that it shall make."""
    pid = spawn(NAME, arch.PAUSE_CODE, fds, survives=False)
    while pid == wanted:
        end_process(pid)
        # The kernel counts on: the next one is another.
        pid = spawn(NAME, arch.PAUSE_CODE, fds, survives=False)
    return pid


def take_over(pid: Pid) -> Task:
    """Stop a program of ours that waits for it."""
    try:
        # The restored process may get filters that forbid what we still have to do in it.
        ptrace.seize(Tid(pid), _OPTIONS | ptrace.Option.SUSPEND_SECCOMP)
    except (NotPermitted, OSError):
        # Not for us, or not here: then nothing that is confined is restored.
        ptrace.seize(Tid(pid), _OPTIONS)
    ptrace.interrupt(Tid(pid))
    return adopt(Tid(pid))


def adopt(tid: Tid, number: Tid | None = None) -> Task:
    """Wait for the first stop of a task that we made: it is traced from birth, and ran nothing.

    Args:
        tid: as we see it.
        number: as it sees itself, if that is another one.
    """
    status = ptrace.wait(tid)
    if status is None or status.kind is not ptrace.Kind.INTERRUPTED:
        raise TargetGone(tid)
    task = Task(tid, number or tid)
    task.read_state()
    # What it inherited is the mask of a remote call: everything blocked.
    task.sigmask = 0
    return task


def _enter_time_namespace(seed: Task, offsets: ClockOffsets) -> None:
    reply = seed.run_single(SYSCALL_AT, NR.unshare, CloneFlag.NEWTIME)
    if not reply.ok:
        raise RestoreFailed("making a time namespace", str(reply))
    lines = ""
    for clock, ns in (("monotonic", offsets.monotonic_ns), ("boottime", offsets.boottime_ns)):
        lines += f"{clock} {ns // 1_000_000_000} {ns % 1_000_000_000}\n"
    try:
        Path(f"/proc/{seed.tid}/timens_offsets").write_text(lines, encoding="ascii")
    except OSError as error:
        raise RestoreFailed("setting the clocks of the time namespace", str(error)) from error


def _bear_into(seed: Task, space_at: Fd) -> None:
    """Let what the seed makes from now on be born into the namespace that it has open."""
    for nr, *args in ((NR.setns, space_at, CloneFlag.NEWPID), (NR.close, space_at)):
        reply = seed.run_single(SYSCALL_AT, nr, *args)
        if not reply.ok:
            raise RestoreFailed("entering a pid namespace", str(reply))


def clone(seed: Task, flags: int, pid: Pid) -> Pid:
    """Fork the seed; the child has the number `pid` where it lives. Returns the one that we see.

    Raises:
        PidTaken: the number is in use.
        RestoreFailed: the kernel refused something else.
    """
    at = RemoteAddr(seed.registers.rsp - 1024)
    set_tid = RemoteAddr(at + CLONE_ARGS_SIZE_VER1)
    args = pack_clone_args(flags=CloneFlag(flags), set_tid=set_tid, n_set_tid=1)
    memory.write(seed.tid, at, args + pack_set_tid([Tid(pid)]))
    reply = seed.run_single(SYSCALL_AT, NR.clone3, at, len(args))
    if reply.error == _EEXIST:
        raise taken(pid)
    if not reply.ok:
        raise RestoreFailed(f"making process {pid}", str(reply))
    return Pid(reply.value)


def end_process(pid: Pid) -> None:
    """Kill a process of ours and reap it, with all threads that we trace."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    # A leader can be reaped only after its threads were, and those wait for their tracer: us.
    for tid in reversed(list_tids(pid)):
        see_off(tid)


def see_off(tid: Tid) -> None:
    """Wait for the end of a task of ours that was killed or has exited, and reap it."""
    with contextlib.suppress(TargetGone):
        while (status := ptrace.wait(tid)) is not None and not status.gone:
            pass
