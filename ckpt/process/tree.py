"""Which processes and threads belong to a target, who it is, and whether we may touch it at all.

Reads /proc only; stops nothing. `freezer.py` stops what is listed here.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import attrs

from ckpt.errors import TargetError, TargetGone, TargetRefused
from ckpt.kernel.procfs import files
from ckpt.kernel.procfs import stat as procfs_stat
from ckpt.kernel.procfs import status as procfs_status
from ckpt.kernel.procfs.held import HeldFiles
from ckpt.units import Pid, Tid

_PF_KTHREAD = 0x00200000


@attrs.frozen(slots=True, repr=False)
class Identity:
    """Who a process is, for as long as this kernel runs: pids are used again, this is not."""

    boot_id: str
    pid: Pid
    start_ticks: int
    """Start time in clock ticks since boot (stat field 22), in the host's time namespace."""


@lru_cache(maxsize=1)
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


def reachable_as(pid: Pid) -> Pid:
    """Return the number by which a process can be asked about: its pid, if its first thread lives.

    Else that of its oldest living thread: /proc shows nothing of its memory and its files under
    the number of one that has ended, and no call takes that.
    """
    if not has_ended(pid):
        return pid
    return next((Pid(tid) for tid in _tids_or_none(pid) if tid != Tid(pid)), pid)


def number_of(pid: Pid) -> Pid:
    """Return the pid of a process that is known as `pid` (`reachable_as`).

    Raises:
        TargetGone: it has ended.
    """
    return procfs_status.read_status(pid).tgid


def has_ended(pid: Pid) -> bool:
    """Tell whether the process, or the thread, is a zombie or does not exist any more."""
    try:
        return procfs_stat.read_stat(pid).state in "XZ"
    except TargetGone:
        return True


@contextlib.contextmanager
def ending_told(pids: Iterable[Pid]) -> Iterator[None]:
    """Whatever fails in the block because one of the processes has ended, say that.

    Args:
        pids: walked when something has failed.

    Raises:
        TargetGone: something failed, and that process is not there any more.
    """
    try:
        yield
    except (OSError, TargetError) as error:
        for pid in pids:
            if has_ended(pid):
                raise TargetGone(pid) from error
        raise


class Children:
    """The children of one process; what is read for that is opened when this is made.

    So the second look, at the frozen process, is one burst however many threads there are.
    """

    def __init__(self, pid: Pid) -> None:
        """Open what there is to read.

        Raises:
            TargetGone: the process ended.
        """
        self._pid = pid
        self._held = HeldFiles(pid, [_children_of(tid) for tid in list_tids(pid)])
        self.close = self._held.close

    def list(self, tids: Iterable[Tid]) -> list[Pid]:
        """Return the children of these threads, those included that have ended; ascending.

        Raises:
            TargetGone: the process ended.
        """
        sizes = self._held.read_sizes()
        names = [_children_of(tid) for tid in tids]
        try:
            texts = [files.read_text(self._pid, name) for name in names if sizes.get(name) != 0]
        except TargetGone:
            # A thread ended meanwhile, or a kernel without CONFIG_PROC_CHILDREN: ask everybody.
            return [child for child in files.list_pids() if _is_child(child, self._pid)]
        return sorted(Pid(int(word)) for text in texts for word in text.split())


def _children_of(tid: Tid) -> str:
    return f"task/{tid}/children"


def list_children(pid: Pid) -> list[Pid]:
    """Return the children of a process, ended ones included, ascending; a moment's view.

    Raises:
        TargetGone: the process ended.
    """
    with contextlib.closing(Children(pid)) as children:
        return children.list(list_tids(pid))


def _is_child(child: Pid, pid: Pid) -> bool:
    try:
        return procfs_stat.read_stat(child).ppid == pid
    except TargetGone:
        return False


def list_tree(root: Pid) -> list[Pid]:
    """Return a process and all its living descendants, each behind its parent; a moment's view.

    Each as it can be asked about (`reachable_as`).

    Raises:
        TargetGone: `root` ended.
    """
    tree = [root]
    for pid in tree:
        try:
            tree += [reachable_as(child) for child in list_children(pid) if not is_zombie(child)]
        except TargetGone:
            if pid == root:
                raise
    return tree


def is_zombie(pid: Pid) -> bool:
    """Tell whether a process has ended as a whole; True if it was waited for."""
    return has_ended(pid) and len(_tids_or_none(pid)) < 2


def _tids_or_none(pid: Pid) -> list[Tid]:
    try:
        return files.list_tids(pid)
    except TargetGone:
        return []


def refuse_untouchable(pid: Pid) -> None:
    """Refuse a pid that must never be stopped by us.

    Raises:
        TargetGone: there is no such process.
        TargetRefused: it is ckpt itself, an ancestor of it, init, a kernel thread, a thread that
            is no process, a zombie, or traced by somebody else.
    """
    status = procfs_status.read_status(pid)
    if status.tgid != pid and not has_ended(status.tgid):
        raise TargetRefused(pid, f"is a thread of process {status.tgid}: name that one")
    if status.tgid == os.getpid():
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
        if ancestor == status.tgid:
            raise TargetRefused(pid, "is an ancestor of this ckpt: it would stop itself")
        ancestor = Pid(procfs_stat.read_stat(ancestor).ppid)
