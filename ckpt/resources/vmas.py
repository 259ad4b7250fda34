"""The mappings of a process: looked at while it runs, confirmed while it is frozen.

/proc/PID/smaps counts every page (15 ms for 1 GiB) and takes long to parse; it alone has the flags.
/proc/PID/maps counts none, and has the same line for each mapping. So the flags are read, and the
records built, before the freeze; the frozen process is asked for its lines only.
"""

import os
from collections.abc import Iterable, Iterator

import attrs

from ckpt.errors import Finding, UnsupportedState
from ckpt.kernel.procfs import maps
from ckpt.kernel.procfs import status as procfs_status
from ckpt.kernel.sysvipc import is_segment
from ckpt.resources.file_identity import FileIdentity, identify
from ckpt.resources.mappings import (
    KERNEL_VMAS,
    file_problem,
    identify_nameless,
    is_file,
    problem_of,
)
from ckpt.units import AddrRange, Pid, RemoteAddr

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
_VSYSCALL = "[vsyscall]"


@attrs.frozen(slots=True, repr=False)
class VmaRecord:
    """One mapping."""

    start: int
    end: int
    prot: int
    """PROT_* bits."""
    shared: bool
    special: str
    """One of `KERNEL_VMAS`, or empty."""
    file: int
    """Index into `MemoryRecord.files`, -1 if anonymous."""
    offset_bytes: int
    flags: tuple[str, ...]
    """VmFlags codes of /proc/PID/smaps (proc_pid_smaps(5))."""
    name: str
    """The name of an anonymous mapping, empty if it has none."""

    @property
    def span(self) -> AddrRange:
        """Its addresses."""
        return AddrRange(RemoteAddr(self.start), RemoteAddr(self.end))

    @property
    def has_own_pages(self) -> bool:
        """Tell whether its pages can be the process's own (not a file's, not the kernel's)."""
        return not self.shared and not self.special


def iter_own_vmas(vmas: Iterable[maps.Vma]) -> Iterator[maps.Vma]:
    """Leave out what the kernel maps at the same place for everybody."""
    return (vma for vma in vmas if vma.path != _VSYSCALL)


class FileTable:
    """Collects the mapped files of one process, each once."""

    def __init__(self) -> None:
        """Begin with none."""
        self._index: dict[object, int] = {}
        self._mapped: list[maps.Vma] = []
        """A mapping of each."""

    def record(self, vma: maps.Vma) -> VmaRecord:
        """Return the record of a VMA, noting its file."""
        path = vma.path or ""
        prot = PROT_READ * vma.readable | PROT_WRITE * vma.writable | PROT_EXEC * vma.executable
        return VmaRecord(
            start=vma.span.start,
            end=vma.span.end,
            prot=prot,
            shared=vma.shared,
            special=path if path in KERNEL_VMAS else "",
            file=self._file(vma) if is_file(vma) else -1,
            offset_bytes=vma.offset_bytes if is_file(vma) else 0,
            flags=tuple(sorted(vma.flags)),
            name=vma.anon_name or "",
        )

    def _file(self, vma: maps.Vma) -> int:
        # All that has no name any more may have the same one.
        key = (vma.dev, vma.inode) if vma.deleted or vma.anon_name else vma.path or ""
        if key not in self._index:
            self._index[key] = len(self._mapped)
            self._mapped.append(vma)
        return self._index[key]

    def identify(self, pid: Pid, known: dict[object, FileIdentity]) -> tuple[FileIdentity, ...]:
        """Return what each file is now, in the order of the index.

        Args:
            pid: who maps them.
            known: what was found since the tree stands still; those of this process are added.

        Raises:
            UnsupportedState: one is not behind its name any more.
        """
        identities = []
        for vma in self._mapped:
            key = vma.path, vma.dev, vma.inode
            if key not in known:
                known[key] = _identify(pid, vma)
            identities.append(known[key])
        return tuple(identities)


def _identify(pid: Pid, vma: maps.Vma) -> FileIdentity:
    path = vma.path or ""
    nameless = identify_nameless(pid, vma)
    if nameless is not None:
        return nameless
    problem = file_problem(pid, vma)
    if problem or not os.path.exists(path):
        problem = problem or "the mapped file has just been removed"
        raise UnsupportedState(pid, (Finding(f"memory {vma.span} {path}", problem),))
    return identify(path, os.stat(path))


@attrs.frozen(slots=True, eq=False, repr=False)
class Looked:
    """All mappings of a process, with their flags.

    Each is confirmed by its line in /proc/PID/maps, memory locks by their sum (`VmLck`). What that
    can miss is an madvise between look and freeze, on a mapping that it did not split.
    """

    locked_bytes: int
    vmas: dict[str, maps.Vma]
    """By the line in maps."""
    records: tuple[VmaRecord, ...]
    """Of those that are the process's own."""
    files: FileTable


def look_at_vmas(pid: Pid) -> Looked:
    """Read the mappings with their flags, as slow as that is."""
    return _as_looked_at(
        procfs_status.read_status(pid).vm_locked_bytes, maps.read_smaps_by_line(pid)
    )


def iter_findings(pid: Pid, looked: Looked) -> Iterator[Finding]:
    """Name every mapping that cannot be captured."""
    for vma in iter_own_vmas(looked.vmas.values()):
        problem = problem_of(pid, vma)
        if problem:
            yield Finding(" ".join(filter(None, (f"memory {vma.span}", vma.path))), problem)


def confirm_vmas(pid: Pid, looked: Looked | None, lines: list[str], locked_bytes: int) -> Looked:
    """Return the mappings of a frozen process: those that were looked at, if they still are.

    Args:
        pid: the process.
        looked: what was found before it was stopped, all of it supported; None if nothing was.
        lines: of /proc/PID/maps now.
        locked_bytes: `VmLck` now.

    Raises:
        UnsupportedState: a mapping that was made meanwhile cannot be captured.
    """
    if looked is not None and looked.locked_bytes == locked_bytes:
        if lines == list(looked.vmas):
            return looked
        if all(line in looked.vmas for line in lines):
            return _as_looked_at(locked_bytes, {line: looked.vmas[line] for line in lines})
    new = look_at_vmas(pid)
    findings = tuple(iter_findings(pid, new))
    if findings:
        raise UnsupportedState(pid, findings)
    return new


def _as_looked_at(locked_bytes: int, vmas: dict[str, maps.Vma]) -> Looked:
    files = FileTable()
    own = iter_own_vmas(vmas.values())
    # Attached segments are recorded by `sysv.py`.
    records = tuple(files.record(vma) for vma in own if not is_segment(vma.path))
    return Looked(locked_bytes, vmas, records, files)
