"""Which mappings can be captured: each property that the kernel shows is known here, or refused.

`memory.py` captures and restores what is let through. A property that is neither restored nor
without meaning for a restore would be lost in silence, so an unknown one is refused too.

Kernel: VmFlags and ProtectionKey of /proc/PID/smaps (proc_pid_smaps(5); fs/proc/task_mmu.c,
show_smap_vma_flags, Linux 6.18).
"""

import os

from ckpt.kernel.procfs import maps
from ckpt.kernel.sysvipc import is_segment
from ckpt.resources.content import identify_link
from ckpt.resources.file_identity import FileIdentity
from ckpt.units import Pid

KERNEL_VMAS = ("[vvar]", "[vvar_vclock]", "[vdso]")
"""Mapped by the kernel into each process; moved to their old place, never copied."""

_RESTORED = frozenset(
    ("rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "gd", "nr", "dp")
) | frozenset(("lo", "lf", "sr", "rr", "dc", "dd", "wf", "hg", "nh", "mg", "sl", "gu"))
"""Given back by the calls that map, advise, lock and seal; guard regions page by page."""
_NO_MATTER = frozenset(("ac", "de", "sd", "uw"))
"""How the kernel accounts memory; that it may not grow; written since clear_refs; and
write-protected by a userfaultfd, which is how a tracker of ours shows (a userfaultfd of the
process's own is refused with its descriptor)."""
_REFUSED = {
    "ht": "huge pages of hugetlbfs are not supported yet",
    "sf": "synchronous mappings of persistent memory (MAP_SYNC) are not supported",
    "ss": "a shadow stack is not supported yet",
    "um": "memory whose missing pages a userfaultfd supplies is not supported (after a restore"
    " --lazy: wait until all of it is there)",
    "ui": "memory that a userfaultfd watches for minor faults is not supported",
    "mt": "memory tags are not supported",
}
_DEVICE = frozenset(("io", "pf", "mm", "ar"))
"""Mapped by a driver, page frame by page frame; `ar` is what the processor caches otherwise."""


def is_file(vma: maps.Vma) -> bool:
    """Tell whether a file with an inode is behind a mapping."""
    return vma.inode != 0


def problem_of(pid: Pid, vma: maps.Vma) -> str:
    """Return why a mapping cannot be captured; empty if it can."""
    if vma.path in KERNEL_VMAS:
        return ""
    if is_segment(vma.path):
        return _flags_problem(vma)  # `sysv.py` does the rest
    return _kind_problem(vma) or _flags_problem(vma) or _problem_of_file(pid, vma)


def _flags_problem(vma: maps.Vma) -> str:
    for flag, problem in _REFUSED.items():
        if flag in vma.flags:
            return problem
    if vma.flags & _DEVICE:
        return "device memory cannot be captured"
    if vma.protection_key:
        return f"memory with a protection key ({vma.protection_key}) is not supported yet"
    unknown = vma.flags - _RESTORED - _NO_MATTER
    if unknown:
        return f"a property that is not known here (VmFlags {' '.join(sorted(unknown))})"
    return ""


def _kind_problem(vma: maps.Vma) -> str:
    path = vma.path or ""
    if path.startswith("/SYSV"):
        return "System V shared memory is not supported yet"
    if path.startswith("/secretmem"):
        return "secret memory (memfd_secret) cannot be read by anybody else"
    if path.startswith("/[aio]"):
        return "an AIO ring is not supported yet"
    if path.startswith("anon_inode:"):
        return "memory of an anonymous inode (io_uring, perf, ...) is not supported"
    return ""


def _problem_of_file(pid: Pid, vma: maps.Vma) -> str:
    if not is_file(vma):
        return ""
    try:
        if identify_nameless(pid, vma) is not None:
            return ""  # `content.py` says whether it can travel
    except FileNotFoundError:
        return ""  # unmapped meanwhile; the frozen target is asked again
    except OSError as error:
        return f"the mapped file cannot be examined ({error.strerror})"
    return file_problem(pid, vma)


def identify_nameless(pid: Pid, vma: maps.Vma) -> FileIdentity | None:
    """Return the identity of a mapped file whose content must travel; None if it has a name.

    Raises:
        OSError: it cannot be examined.
    """
    if not vma.deleted and not vma.anon_name:
        return None
    identity = identify_link(_map_file(pid, vma))
    return identity if identity.content else None


def file_problem(pid: Pid, vma: maps.Vma) -> str:
    """Return why a mapped file cannot be mapped again by its name; empty if it can."""
    if vma.deleted:
        return "the mapped file has lost its name and has another, which is not supported yet"
    try:
        if _named_is_mapped(pid, vma):
            return ""
    except FileNotFoundError:
        if os.path.lexists(_map_file(pid, vma)):
            return "the mapped file is not to be found under this name"
        return ""  # the running target has unmapped it meanwhile; the frozen one is asked again
    except OSError as error:
        return f"the mapped file cannot be examined ({error.strerror})"
    return "the mapped file was replaced by another of the same name"


def _named_is_mapped(pid: Pid, vma: maps.Vma) -> bool:
    named = os.stat(vma.path or "")
    if (os.major(named.st_dev), os.minor(named.st_dev), named.st_ino) == (*vma.dev, vma.inode):
        return True
    # On btrfs and overlayfs maps shows another device than stat does.
    mapped = os.stat(_map_file(pid, vma))
    return (mapped.st_dev, mapped.st_ino) == (named.st_dev, named.st_ino)


def _map_file(pid: Pid, vma: maps.Vma) -> str:
    return f"/proc/{pid}/map_files/{vma.span.start:x}-{vma.span.end:x}"
