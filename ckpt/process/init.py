"""The first process of a pid namespace that a restore has made: one of a few instructions.

    made       by a seed, traced; it and the namespace end with us
    watches    the root's pidfd; no tracer any more
    ends       when the root has ended; then the kernel ends what is left of the tree

It ignores SIGCHLD, so the orphans that it is given are gone when they end. It leads a session of
its own: nothing of a terminal reaches it. Nobody here is its parent: whoever is given orphans on
this host waits for it.

Kernel: pid_namespaces(7), pidfd_open(2), ptrace(2) PTRACE_O_EXITKILL.
"""

import contextlib
import os
import struct
from collections.abc import Iterator

from ckpt.errors import NotPermitted, RestoreFailed
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.clone3 import CloneFlag
from ckpt.process import memory
from ckpt.process.pid_space import PidSpace
from ckpt.process.programs import CODE_AT, spawn
from ckpt.process.seed import SYSCALL_AT, adopt, clone, end_process, take_over
from ckpt.process.task import Task
from ckpt.units import Fd, Pid, RemoteAddr, Tid

NAME = "ckpt-init"
FIRST = Pid(1)
_WATCHING = arch.named(NAME) + arch.POLL_CODE
_WATCHING_AT = RemoteAddr(
    CODE_AT + len(arch.BIND_CODE) + len(arch.NAME_CODE) + len(arch.PAUSE_CODE)
)
_SIGCHLD = 17
_IGNORE = struct.pack("<4Q", 1, 0, 0, 0)
"""`struct sigaction` of the kernel: SIG_IGN."""
_SIGSET_BYTES = 8
_WATCHED_FD = 0
"""What `arch.POLL_CODE` waits for; the lowest number, and it has no others."""


class Init:
    """One that does not watch anybody yet."""

    def __init__(self, task: Task) -> None:
        """Take one that stands still."""
        self._task = task

    @property
    def pid(self) -> Pid:
        """As we see it."""
        return Pid(self._task.tid)

    def prepare(self) -> None:
        """Let it ignore the ends of orphans, and belong to no terminal."""
        at = RemoteAddr(self._task.registers.rsp - 1024)
        memory.write(self._task.tid, at, _IGNORE)
        self._run(NR.rt_sigaction, _SIGCHLD, at, 0, _SIGSET_BYTES)
        self._run(NR.setsid)

    def watch(self, root: Pid) -> None:
        """Let it run until the process with this number in its namespace has ended."""
        if self._run(NR.pidfd_open, root, 0) != _WATCHED_FD:
            raise RestoreFailed("starting the init of a pid namespace", "it has other descriptors")
        self._task.registers.rip = _WATCHING_AT
        self._task.disturbed = True
        self._task.put_back()
        ptrace.detach(self._task.tid)

    def _run(self, nr: NR, *args: int) -> int:
        reply = self._task.run_single(SYSCALL_AT, nr, *args)
        if not reply.ok:
            raise RestoreFailed("starting the init of a pid namespace", str(reply))
        return reply.value


@contextlib.contextmanager
def new_pid_space(root: Pid) -> Iterator[tuple[PidSpace, Init | None]]:
    """Make a pid namespace for a tree; if the block fails, all in it end.

    Args:
        root: the number that the root has in it. If that is 1, there is no init of ours.

    Raises:
        NotPermitted: we may not make one.
        RestoreFailed: the kernel refused something else.
    """
    if root == FIRST:
        yield PidSpace(None), None
        return
    init = _start()
    fd = None
    try:
        init.prepare()
        fd = Fd(os.open(f"/proc/{init.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC))
        yield PidSpace(fd), init
    except BaseException:
        end_process(init.pid)
        raise
    finally:
        if fd is not None:
            os.close(fd)


def _start() -> Init:
    parent = spawn(NAME, arch.PAUSE_CODE + _WATCHING, {}, survives=False)
    try:
        made = clone(take_over(parent), CloneFlag.NEWPID, FIRST)
        return Init(adopt(Tid(made), Tid(FIRST)))
    except RestoreFailed as error:
        if "EPERM" in error.reason:
            raise NotPermitted("make a pid namespace", "run ckpt as root") from error
        raise
    finally:
        end_process(parent)
