"""The switches of prctl(2) that can be read back.

Two resources: of the process (subreaper, and what belongs to its memory), and of each thread
(personality and the modes of a task). The latter come behind the credentials, since a change of ids
clears `dumpable` and the parent-death signal.

Kernel: prctl(2), personality(2) inside; /proc/PID/{status,ns} and kcmp(2) from outside.

- `dumpable` 2, which only the kernel sets (fs.suid_dumpable), comes back as 0.
- The parent is the restorer: a parent-death signal comes when that ends. The user is told.
- The I/O-flusher mark can only be read, and set, with CAP_SYS_RESOURCE; without it it is lost.
- PR_SET_MDWE comes back last: it forbids what the restore itself has to do.
- Refused before the target is touched: namespaces other than ours (except time), a vfork that
  waits.
- Not captured: PR_SET_PTRACER.
"""

import struct
import threading
from collections.abc import Iterator, Sequence

import attrs

from ckpt.errors import Finding, TargetGone
from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import (
    PR_MCE_KILL_SET,
    PR_SPEC_INDIRECT_BRANCH,
    PR_SPEC_L1D_FLUSH,
    PR_SPEC_STORE_BYPASS,
    Prctl,
)
from ckpt.kernel.procfs import files as procfs_files
from ckpt.kernel.procfs.stat import read_stat, read_task_stat
from ckpt.process.remote import Call, Out, Reply, call
from ckpt.resources.base import (
    Capture,
    Later,
    Rebuilt,
    Resource,
    Restore,
    Stage,
    Stopped,
    Target,
    expect,
)
from ckpt.units import Pid, Tid

_NAMESPACES = {
    "cgroup": "control group",
    "mnt": "mount",
    "user": "user",
}
_INT = struct.Struct("<i")
_UNKNOWN = -1
_UNSIGNED = 0xFFFF_FFFF
_ASK_PERSONALITY = 0xFFFF_FFFF
"""For personality(2): change nothing."""

_SPECULATION = (PR_SPEC_STORE_BYPASS, PR_SPEC_INDIRECT_BRANCH, PR_SPEC_L1D_FLUSH)
_SPEC_PER_THREAD = 1
"""PR_SPEC_PRCTL: this misfeature can be set for each thread."""


@attrs.frozen(slots=True, repr=False)
class IdentityRecord:
    """What is one for all threads. -1: this kernel does not tell."""

    child_subreaper: bool
    thp_disabled: int
    """0, or 1 and the flags of PR_SET_THP_DISABLE."""
    memory_merge: int


@attrs.frozen(slots=True, repr=False)
class TaskModesRecord:
    """What each thread has set for itself. -1: this kernel does not tell, or not us."""

    personality: int
    parent_death_signal: int
    time_stamp_counter: int
    """PR_TSC_*."""
    machine_check: int
    """PR_MCE_KILL_*."""
    io_flusher: int
    speculation: tuple[int, ...]
    """PR_SPEC_* flags, of store bypass, indirect branches and L1D flush."""
    dumpable: int
    """Of the memory: the same in all threads; so is the next."""
    mdwe: int
    """PR_MDWE_* flags."""


def look(target: Target) -> Iterator[Finding]:
    """Name what one process alone cannot be brought back with."""
    pid = target.pid
    us = Tid(threading.get_native_id())
    ours = {name: _namespace(us, name) for name in _NAMESPACES}
    # The root may have one of its own (`cgroups`).
    ours["cgroup"] = _namespace(target.tree.pids[0], "cgroup")
    for tid in procfs_files.list_tids(pid):
        subject = f"process {pid}" if tid == Tid(pid) else f"thread {tid}"
        try:
            yield from _iter_namespace_findings(tid, subject, ours)
        except TargetGone:
            if tid == Tid(pid):
                raise
    if target.tree.shares_of(pid).memory and _is_waited_for(pid):
        yield Finding(
            f"process {pid}",
            "was made by vfork and has not executed a program yet: until it does, or ends, the one"
            " that made it cannot be stopped",
            "try again",
        )


_CLONING = {int(NR.clone), int(NR.vfork), int(NR.clone3)}


def _is_waited_for(pid: Pid) -> bool:
    """Tell whether a thread of the parent waits in vfork (uninterruptibly) for this process.

    It may be for a sister that has the same memory.
    """
    try:
        parent = Pid(read_stat(pid).ppid)
        for tid in procfs_files.list_tids(parent):
            if read_task_stat(parent, tid).state == "D":
                call_now = procfs_files.read_text(parent, f"task/{tid}/syscall").split()
                if call_now and call_now[0].isdigit() and int(call_now[0]) in _CLONING:
                    return True
    except (OSError, TargetGone):
        # Something has ended: so has the wait.
        return False
    return False


def _iter_namespace_findings(tid: Tid, subject: str, ours: dict[str, str]) -> Iterator[Finding]:
    for name, spoken in _NAMESPACES.items():
        theirs = _namespace(tid, name)
        if theirs and theirs != ours[name]:
            yield Finding(
                subject,
                f"is in another {spoken} namespace than ckpt, which is not supported yet",
                "run ckpt inside that namespace",
            )


def _namespace(pid: Pid | Tid, name: str) -> str:
    """Return the name of a namespace; empty if there is none of that kind, or the task ended."""
    try:
        return procfs_files.read_link(pid, f"ns/{name}")
    except TargetGone:
        return ""


def capture(stopped: Stopped) -> Capture[IdentityRecord]:
    """Ask the process for its switches."""
    del stopped
    subreaper, thp, merge = yield _ASK_SWITCHES
    return IdentityRecord(
        child_subreaper=_int_of(subreaper) > 0,
        thp_disabled=_value_of(thp),
        memory_merge=_value_of(merge),
    )


_ASK_SWITCHES = [
    call(NR.prctl, Prctl.GET_CHILD_SUBREAPER, Out(_INT.size)),
    call(NR.prctl, Prctl.GET_THP_DISABLE, 0, 0, 0, 0),
    call(NR.prctl, Prctl.GET_MEMORY_MERGE, 0, 0, 0, 0),
]


def _value_of(reply: Reply) -> int:
    return reply.value if reply.ok else _UNKNOWN


def _int_of(reply: Reply) -> int:
    return int(_INT.unpack(reply.outs[0])[0]) if reply.ok else _UNKNOWN


def restore(record: IdentityRecord, _rebuilt: Rebuilt) -> Restore:
    """Set what is not the default."""
    calls = []
    if record.child_subreaper:
        calls.append(call(NR.prctl, Prctl.SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    if record.thp_disabled > 0:
        calls.append(call(NR.prctl, Prctl.SET_THP_DISABLE, 1, record.thp_disabled & ~1, 0, 0))
    if record.memory_merge > 0:
        calls.append(call(NR.prctl, Prctl.SET_MEMORY_MERGE, 1, 0, 0, 0))
    expect("setting what the process is", (yield calls))


def capture_modes(stopped: Stopped) -> Capture[TaskModesRecord]:
    """Ask the thread for its modes."""
    del stopped
    replies = yield _QUESTIONS
    return Later(lambda: _modes_of(replies))


_QUESTIONS = [
    call(NR.personality, _ASK_PERSONALITY),
    call(NR.prctl, Prctl.GET_PDEATHSIG, Out(_INT.size)),
    call(NR.prctl, Prctl.GET_TSC, Out(_INT.size)),
    call(NR.prctl, Prctl.MCE_KILL_GET, 0, 0, 0, 0),
    call(NR.prctl, Prctl.GET_IO_FLUSHER, 0, 0, 0, 0),
    call(NR.prctl, Prctl.GET_DUMPABLE),
    call(NR.prctl, Prctl.GET_MDWE, 0, 0, 0, 0),
    *(call(NR.prctl, Prctl.GET_SPECULATION_CTRL, which, 0, 0, 0) for which in _SPECULATION),
]


def _modes_of(replies: Sequence[Reply]) -> TaskModesRecord:
    personality, death_signal, tsc, machine_check, io_flusher, dumpable, mdwe, *speculation = (
        replies
    )
    return TaskModesRecord(
        personality=personality.value & _UNSIGNED,
        parent_death_signal=max(_int_of(death_signal), 0),
        time_stamp_counter=_int_of(tsc),
        machine_check=_value_of(machine_check),
        io_flusher=_value_of(io_flusher),
        speculation=tuple(map(_value_of, speculation)),
        dumpable=_value_of(dumpable),
        mdwe=_value_of(mdwe),
    )


def restore_modes(record: TaskModesRecord, rebuilt: Rebuilt) -> Restore:
    """Set what differs from what the thread has, MDWE last."""
    now = _modes_of((yield _QUESTIONS))
    expect("setting the modes of a thread", (yield list(_iter_changes(record, now))))
    if record.parent_death_signal and rebuilt.task.tid == Tid(rebuilt.pid):
        rebuilt.warn(
            f"its parent is ckpt now: when that ends, the process gets signal"
            f" {record.parent_death_signal} (its parent-death signal)"
        )


_SETTERS = {
    "parent_death_signal": (Prctl.SET_PDEATHSIG,),
    "time_stamp_counter": (Prctl.SET_TSC,),
    "machine_check": (Prctl.MCE_KILL, PR_MCE_KILL_SET),
    "io_flusher": (Prctl.SET_IO_FLUSHER,),
}


def _iter_changes(record: TaskModesRecord, now: TaskModesRecord) -> Iterator[Call]:
    if record.personality != now.personality:
        yield call(NR.personality, record.personality)
    for name, setter in _SETTERS.items():
        wanted = getattr(record, name)
        if wanted not in (_UNKNOWN, getattr(now, name)):
            yield call(NR.prctl, *setter, wanted, *(0,) * (4 - len(setter)))
    for which, wanted, here in zip(_SPECULATION, record.speculation, now.speculation, strict=True):
        if wanted != here and wanted > 0 and here > 0 and wanted & here & _SPEC_PER_THREAD:
            control = wanted & ~_SPEC_PER_THREAD
            yield call(NR.prctl, Prctl.SET_SPECULATION_CTRL, which, control, 0, 0)
    dumpable = int(record.dumpable == 1)
    if dumpable != now.dumpable:
        yield call(NR.prctl, Prctl.SET_DUMPABLE, dumpable, 0, 0, 0)
    if record.mdwe > 0 and record.mdwe != now.mdwe:
        yield call(NR.prctl, Prctl.SET_MDWE, record.mdwe, 0, 0, 0)


IDENTITY = Resource(
    "identity", IdentityRecord, Stage.PROCESS, capture=capture, restore=restore, look=look
)
TASK_MODES = Resource(
    "task_modes",
    TaskModesRecord,
    Stage.CREDENTIALS,
    capture=capture_modes,
    restore=restore_modes,
)
