"""/proc/PID/status: identity, credentials, signal masks and sizes of one task.

Source: proc_pid_status(5), fs/proc/array.c.
"""

import re
from functools import lru_cache

import attrs

from ckpt.kernel.procfs.files import read_text
from ckpt.units import Pid, Tid

Ids = tuple[int, int, int, int]
"""(real, effective, saved, file system)."""


@attrs.frozen(slots=True, repr=False)
class Status:
    """What /proc/PID/status (or task/TID/status) tells; see proc_pid_status(5) for each."""

    name: str
    """The thread's name: any characters but NUL, surrogates for bytes that are not UTF-8."""
    state: str
    """One letter: R S D T t Z X I P."""
    umask: int | None
    """None for a task without file system context (a zombie, a kernel thread)."""
    tgid: Pid
    pid: Tid
    """The thread's own number; equals `tgid` for the leader."""
    ppid: Pid
    tracer_pid: Pid
    """0 if not traced."""
    uids: Ids
    gids: Ids
    groups: tuple[int, ...]
    ns_tgid: tuple[int, ...]
    """One number for each pid namespace, ours first, the task's own last; so the next three."""
    ns_pid: tuple[int, ...]
    ns_pgid: tuple[int, ...]
    ns_sid: tuple[int, ...]
    is_kernel_thread: bool
    """Told by `Kthread` (6.8 on); before, by the lack of memory in a task that is no zombie."""
    vm_size_bytes: int
    """0 for a task without memory, as the next three."""
    vm_rss_bytes: int
    vm_locked_bytes: int
    vm_pinned_bytes: int
    """Memory that devices or io_uring hold in place."""
    vm_swap_bytes: int
    n_threads: int
    n_queued_signals: int
    """Of the real user, over all processes."""
    pending: int
    """Signal masks: bit n - 1 is signal n. This one is of the thread."""
    shared_pending: int
    blocked: int
    ignored: int
    caught: int
    cap_inheritable: int
    """Capability masks: bit n is capability n."""
    cap_permitted: int
    cap_effective: int
    cap_bounding: int
    cap_ambient: int
    no_new_privs: bool
    seccomp_mode: int
    """0 none, 1 strict, 2 filters."""
    n_seccomp_filters: int
    thp_enabled: bool
    """False after PR_SET_THP_DISABLE."""
    cpus_allowed: str
    """A list, as in `0-3,7`."""


def parse_status(text: str) -> Status:
    """Parse /proc/PID/status; fields that an older kernel lacks get their neutral value.

    Raises:
        ValueError: a field that every kernel has is missing or malformed.
    """
    fields = {}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            fields[key] = value.strip(" \t") if key != "Name" else value.removeprefix("\t")
    try:
        return _status_of(fields)
    except KeyError as error:
        raise ValueError(f"/proc/PID/status has no field {error}") from error


def _status_of(fields: dict[str, str]) -> Status:
    umask = fields.get("Umask")
    tgid = fields["Tgid"]
    pid = fields["Pid"]
    state = fields["State"][0]
    return Status(
        name=unescape_name(fields["Name"]),
        state=state,
        umask=None if umask is None else int(umask, 8),
        tgid=Pid(int(tgid)),
        pid=Tid(int(pid)),
        ppid=Pid(int(fields["PPid"])),
        tracer_pid=Pid(int(fields["TracerPid"])),
        uids=_ids(fields["Uid"]),
        gids=_ids(fields["Gid"]),
        groups=_numbers(fields["Groups"]),
        ns_tgid=_numbers(fields.get("NStgid", tgid)),
        ns_pid=_numbers(fields.get("NSpid", pid)),
        ns_pgid=_numbers(fields.get("NSpgid", "")),
        ns_sid=_numbers(fields.get("NSsid", "")),
        is_kernel_thread=_is_kernel_thread(fields, state),
        vm_size_bytes=_kib(fields.get("VmSize")),
        vm_rss_bytes=_kib(fields.get("VmRSS")),
        vm_locked_bytes=_kib(fields.get("VmLck")),
        vm_pinned_bytes=_kib(fields.get("VmPin")),
        vm_swap_bytes=_kib(fields.get("VmSwap")),
        n_threads=int(fields.get("Threads", "1")),
        n_queued_signals=int(fields["SigQ"].partition("/")[0]) if "SigQ" in fields else 0,
        pending=_mask(fields.get("SigPnd")),
        shared_pending=_mask(fields.get("ShdPnd")),
        blocked=_mask(fields.get("SigBlk")),
        ignored=_mask(fields.get("SigIgn")),
        caught=_mask(fields.get("SigCgt")),
        cap_inheritable=_mask(fields["CapInh"]),
        cap_permitted=_mask(fields["CapPrm"]),
        cap_effective=_mask(fields["CapEff"]),
        cap_bounding=_mask(fields["CapBnd"]),
        cap_ambient=_mask(fields.get("CapAmb")),
        no_new_privs=fields.get("NoNewPrivs", "0") != "0",
        seccomp_mode=int(fields.get("Seccomp", "0")),
        n_seccomp_filters=int(fields.get("Seccomp_filters", "0")),
        thp_enabled=fields.get("THP_enabled", "1") != "0",
        cpus_allowed=fields["Cpus_allowed_list"],
    )


def _is_kernel_thread(fields: dict[str, str], state: str) -> bool:
    told = fields.get("Kthread")
    if told is not None:
        return told == "1"
    return "VmSize" not in fields and state not in "ZX"


def _ids(text: str) -> Ids:
    real, effective, saved, file_system = _numbers(text)
    return real, effective, saved, file_system


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


def _kib(text: str | None) -> int:
    return 0 if text is None else int(text.split()[0]) * 1024


def _mask(text: str | None) -> int:
    return 0 if text is None else int(text, 16)


def unescape_name(text: str) -> str:
    r"""Undo the kernel's escapes in a thread's name: `\n` and `\\`, nothing else."""
    if "\\" not in text:
        return text
    return "\\".join(part.replace("\\n", "\n") for part in text.split("\\\\"))


@attrs.frozen(slots=True, repr=False)
class SignalMasks:
    """The signals of a task; see `Status`."""

    pending: int
    shared_pending: int
    blocked: int
    ignored: int
    caught: int


_FIRST_MASK = b"\nSigPnd:\t"
_MASKS = re.compile(
    rb"\nSigPnd:\t(\w+)\nShdPnd:\t(\w+)\nSigBlk:\t(\w+)\nSigIgn:\t(\w+)\nSigCgt:\t(\w+)\n"
)
_MASKS_BYTES = 5 * (len(_FIRST_MASK) + 16) + 1
"""Masks of 64 signals."""


def parse_signal_masks(raw: bytes) -> SignalMasks:
    """Take the signal masks, and nothing else, out of /proc/PID/status.

    Raises:
        ValueError: they are not there.
    """
    at = raw.find(_FIRST_MASK)
    return _masks_of(raw[at : at + _MASKS_BYTES])


@lru_cache(maxsize=64)
def _masks_of(lines: bytes) -> SignalMasks:
    """Parse these lines, which most threads of a process have in common."""
    found = _MASKS.match(lines)
    if found is None:
        raise ValueError("/proc/PID/status has no signal masks")
    return SignalMasks(*(int(word, 16) for word in found.groups()))


_LOCKED = re.compile(rb"^VmLck:\s+(\d+) kB$", re.MULTILINE)


def parse_locked_bytes(raw: bytes) -> int:
    """Take `VmLck`, and nothing else, out of /proc/PID/status; 0 where there is no memory."""
    found = _LOCKED.search(raw)
    return int(found[1]) * 1024 if found else 0


def read_status(pid: Pid | Tid) -> Status:
    """Read /proc/PID/status of a process, or of any thread by its tid.

    Raises:
        TargetGone: the task ended and was waited for.
    """
    return parse_status(read_text(pid, "status"))


def read_task_status(pid: Pid, tid: Tid) -> Status:
    """Read the status of a thread, sure that it is one of process `pid`.

    Raises:
        TargetGone: `pid` has no such thread (any more).
    """
    return parse_status(read_text(pid, f"task/{tid}/status"))
