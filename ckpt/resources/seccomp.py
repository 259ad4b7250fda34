"""What a thread may ask the kernel: seccomp's strict mode, and its filters.

Kernel: seccomp(2), PTRACE_SECCOMP_GET_FILTER (4.4), PTRACE_SECCOMP_GET_METADATA (4.16),
/proc/PID/status (Seccomp, Seccomp_filters), PTRACE_O_SUSPEND_SECCOMP (4.3); kernel/seccomp.c.

Filters are installed in the order in which they were, oldest first, and a program that several
threads have is in the image once. What all threads of a process have in common, from the oldest on,
is installed once for all of them (SECCOMP_FILTER_FLAG_TSYNC), so they share it as they did: the
process can go on synchronizing its threads. Filters that only some threads have are each one's own
afterwards, also where some of these inherited them from another.

Our remote calls are judged by no filter and no strict mode: all our stops suspend both, in a target
as in a process under construction. So filters come before the credentials, since without
no_new_privs installing them takes CAP_SYS_ADMIN, which most confined processes have given up.

- The speculation controls that a filter sets along are those of `identity`: filters are installed
  with SECCOMP_FILTER_FLAG_SPEC_ALLOW.
- Refused before anything is stopped: confined threads, if we lack CAP_SYS_ADMIN, or are confined
  ourselves. Refused when it is stopped, since no other way tells: a filter that hands calls to a
  listener (SECCOMP_RET_USER_NOTIF), whose descriptor and waiting calls cannot be had again.
- If ckpt is killed while a batch of remote calls runs, the rest of that batch is judged by the
  target's own filters.
"""

import os
from collections.abc import Iterable, Iterator, Sequence

import attrs

from ckpt.errors import Finding, RestoreFailed, TargetGone, UnsupportedState
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features
from ckpt.kernel.procfs import files as procfs_files
from ckpt.kernel.seccomp import (
    BPF_MAXINSNS,
    FPROG_POINTER_OFFSET,
    SECCOMP_SET_MODE_FILTER,
    SECCOMP_SET_MODE_STRICT,
    SOCK_FILTER_BYTES,
    FilterFlag,
    Mode,
    may_notify,
    pack_fprog,
    parse_mode,
)
from ckpt.process.remote import Call, In, Reply, call
from ckpt.process.task import Task
from ckpt.resources.base import Capture, Rebuilt, Resource, Restore, Stage, Stopped, Target
from ckpt.units import Pid, Tid

_STEP = "installing seccomp filters"


@attrs.frozen(slots=True, repr=False)
class FilterRecord:
    """One filter."""

    program: bytes
    """`struct sock_filter`, 8 bytes each."""
    log: bool
    """SECCOMP_FILTER_FLAG_LOG."""

    def __attrs_post_init__(self) -> None:
        """Refuse what is no program."""
        n, rest = divmod(len(self.program), SOCK_FILTER_BYTES)
        if rest or not 0 < n <= BPF_MAXINSNS:
            raise ValueError(f"{len(self.program)} bytes are no seccomp filter")


@attrs.frozen(slots=True, repr=False)
class ConfinedRecord:
    """How one thread is confined."""

    mode: int
    """SECCOMP_MODE_*."""
    chain: tuple[int, ...]
    """Its filters, oldest first: indices into `SeccompRecord.filters`."""


@attrs.frozen(slots=True, repr=False)
class SeccompRecord:
    """How the threads of a process are confined."""

    filters: tuple[FilterRecord, ...]
    """Each only once."""
    threads: tuple[ConfinedRecord, ...]
    """The first one's, then the others in the order in which the image has them; empty if none is
    confined."""

    def __attrs_post_init__(self) -> None:
        """Refuse a reference to nothing."""
        for thread in self.threads:
            if thread.mode not in tuple(Mode):
                raise ValueError(f"there is no seccomp mode {thread.mode}")
            if any(not 0 <= index < len(self.filters) for index in thread.chain):
                raise ValueError("a thread has a seccomp filter that is not there")


def look(target: Target) -> Iterator[Finding]:
    """Name what keeps us from confined threads."""
    pid = target.pid
    for tid in procfs_files.list_tids(pid):
        subject = f"process {pid}" if tid == Tid(pid) else f"thread {tid}"
        try:
            mode, _ = parse_mode(procfs_files.read_bytes(pid, f"task/{tid}/status"))
        except TargetGone:
            if tid == Tid(pid):
                raise
            continue
        if mode == Mode.DISABLED:
            continue
        if mode not in tuple(Mode):
            yield Finding(subject, f"is in a seccomp mode that is not known ({mode})")
        if obstacle := _obstacle(target.features):
            yield Finding(
                subject,
                f"is confined by seccomp, and {obstacle}",
                "run ckpt as root, and not confined by seccomp",
            )
            return


def _obstacle(features: Features) -> str:
    """Tell why we cannot read filters and suspend them; empty if we can."""
    if "sys_admin" not in features.capabilities:
        return "ckpt lacks cap_sys_admin"
    if parse_mode(procfs_files.read_bytes(Pid(os.getpid()), "status"))[0]:
        return "so is ckpt itself"
    return ""


def capture(stopped: Stopped) -> Capture[SeccompRecord]:
    """Read the filters of all threads; from outside.

    Raises:
        UnsupportedState: one of them hands calls to a listener.
    """
    frozen = stopped.frozen
    others = [task for task in frozen.tasks.values() if task is not frozen.leader]
    table: dict[FilterRecord, int] = {}
    threads = [_read_thread(task, table) for task in (frozen.leader, *others)]
    findings = tuple(_iter_listener_findings(stopped.pid, table))
    if findings:
        raise UnsupportedState(stopped.pid, findings)
    if all(thread.mode == Mode.DISABLED for thread in threads):
        threads = []
    yield []
    return SeccompRecord(tuple(table), tuple(threads))


def _read_thread(task: Task, table: dict[FilterRecord, int]) -> ConfinedRecord:
    mode, n_filters = parse_mode(task.status_text)
    chain: list[int] = []
    if mode == Mode.FILTER:
        # Where the kernel does not tell how many there are, the first that is missing does.
        while not n_filters or len(chain) < n_filters:
            program = ptrace.get_seccomp_filter(task.tid, len(chain))
            if program is None:
                break
            flags = ptrace.get_seccomp_flags(task.tid, len(chain))
            record = FilterRecord(program, log=bool(flags & FilterFlag.LOG))
            chain.append(table.setdefault(record, len(table)))
    return ConfinedRecord(mode, tuple(chain))


def _iter_listener_findings(pid: Pid, filters: Iterable[FilterRecord]) -> Iterator[Finding]:
    if any(may_notify(one.program) for one in filters):
        yield Finding(
            f"process {pid}",
            "has a seccomp filter that hands calls to a listener (SECCOMP_RET_USER_NOTIF), which"
            " is not supported",
        )


def check_host(record: SeccompRecord, features: Features) -> Iterator[Finding]:
    """Name what keeps us from confining anybody."""
    obstacle = _obstacle(features) if record.threads else ""
    if obstacle:
        yield Finding(
            "seccomp",
            f"the process was confined by it, and {obstacle}",
            "run ckpt as root, and not confined by seccomp",
        )


def restore(record: SeccompRecord, rebuilt: Rebuilt) -> Restore:
    """Install what all threads have in common, then what each has for itself."""
    if not record.threads:
        return
    embryo = rebuilt.embryo
    others = [task for task in embryo.tasks.values() if task is not embryo.leader]
    tasks = [embryo.leader, *others]
    if len(tasks) != len(record.threads):
        reason = f"the image has {len(record.threads)} confined threads, not {len(tasks)}"
        raise RestoreFailed(_STEP, reason)
    shared = _common_prefix([thread.chain for thread in record.threads]) if others else 0
    together = record.threads[0].chain[:shared]
    replies = yield [_install(record.filters[i], FilterFlag.TSYNC) for i in together]
    _expect_zero(replies)
    for task, thread in zip(tasks, record.threads, strict=True):
        calls = [_install(record.filters[i], FilterFlag.NONE) for i in thread.chain[shared:]]
        if thread.mode == Mode.STRICT:
            calls.append(call(NR.seccomp, SECCOMP_SET_MODE_STRICT, 0, 0))
        if calls:
            _expect_zero(embryo.run(calls, task))


def _common_prefix(chains: Sequence[tuple[int, ...]]) -> int:
    """Return how many filters, from the oldest on, all threads have in common."""
    n = 0
    for filters in zip(*chains, strict=False):
        if len(set(filters)) > 1:
            break
        n += 1
    return n


def _install(record: FilterRecord, more: FilterFlag) -> Call:
    flags = more | FilterFlag.SPEC_ALLOW | (FilterFlag.LOG if record.log else FilterFlag.NONE)
    fprog = In(pack_fprog(record.program), ((FPROG_POINTER_OFFSET, record.program),))
    return call(NR.seccomp, SECCOMP_SET_MODE_FILTER, flags, fprog)


def _expect_zero(replies: Iterable[Reply]) -> None:
    """Take only success: a thread that cannot be synchronized is told by its number."""
    for reply in replies:
        if reply.value != 0:
            raise RestoreFailed(_STEP, str(reply))


SECCOMP = Resource(
    "seccomp",
    SeccompRecord,
    Stage.CREDENTIALS,
    capture=capture,
    restore=restore,
    look=look,
    check_host=check_host,
)
