"""Which threads a target has, who it is, and whether we may touch it at all.

Reads /proc only; stops nothing. `freezer.py` stops what is listed here.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import attrs

from ckpt.errors import TargetError, TargetGone, TargetRefused
from ckpt.kernel.procfs import files
from ckpt.kernel.procfs import stat as procfs_stat
from ckpt.kernel.procfs import status as procfs_status
from ckpt.units import Pid, Tid

_PF_KTHREAD = 0x00200000


@attrs.frozen(slots=True, repr=False)
class Identity:
    """Who a process is, for as long as this kernel runs: pids are used again, this is not."""

    boot_id: str
    pid: Pid
    start_ticks: int
    """Start time in clock ticks since boot (stat field 22), in the host's time namespace."""


def read_boot_id() -> str:
    """Return the id that the kernel gave itself at this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def read_identity(pid: Pid) -> Identity:
    """Return the identity of a process.

    Raises:
        TargetGone: there is none with this pid.
    """
    return Identity(read_boot_id(), pid, procfs_stat.read_stat(pid).start_time_ticks)


def list_tids(pid: Pid) -> list[Tid]:
    """Return the threads of a process, the leader first.

    Raises:
        TargetGone: the process does not exist.
    """
    return sorted(files.list_tids(pid), key=lambda tid: (tid != Tid(pid), tid))


def has_ended(pid: Pid) -> bool:
    """Tell whether the process, or the thread, is a zombie or does not exist any more."""
    try:
        return procfs_stat.read_stat(pid).state in "XZ"
    except TargetGone:
        return True


@contextlib.contextmanager
def ending_told(pid: Pid) -> Iterator[None]:
    """Whatever fails in the block because the process has ended, say that.

    Raises:
        TargetGone: something failed, and the process is not there any more.
    """
    try:
        yield
    except (OSError, TargetError) as error:
        if has_ended(pid):
            raise TargetGone(pid) from error
        raise


def refuse_untouchable(pid: Pid) -> None:
    """Refuse a pid that must never be stopped by us.

    Raises:
        TargetGone: there is no such process.
        TargetRefused: it is ckpt itself, an ancestor of it, init, a kernel thread, a thread that
            is no process, a zombie, or traced by somebody else.
    """
    status = procfs_status.read_status(pid)
    if status.tgid != pid:
        raise TargetRefused(pid, f"is a thread of process {status.tgid}: name that one")
    if pid == os.getpid():
        raise TargetRefused(pid, "is ckpt itself")
    stat = procfs_stat.read_stat(pid)
    if stat.flags & _PF_KTHREAD:
        raise TargetRefused(pid, f"is a kernel thread ({stat.comm})")
    if stat.state in "ZX":
        raise TargetRefused(pid, "has ended already and waits for its parent (a zombie)")
    if status.tracer_pid:
        raise TargetRefused(
            pid, f"is traced by process {status.tracer_pid}: detach that debugger first"
        )
    ancestor = Pid(os.getppid())
    while ancestor > 0:
        if ancestor == pid:
            raise TargetRefused(pid, "is an ancestor of this ckpt: it would stop itself")
        ancestor = Pid(procfs_stat.read_stat(ancestor).ppid)
