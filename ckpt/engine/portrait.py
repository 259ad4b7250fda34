"""What a process of an image was, as ps, pmap and lsof show one that runs; from the image alone.

For `ckpt show`, and for `differing`, which compares two of them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import attrs

from ckpt.engine.examining import Examined, name_of_segment
from ckpt.engine.records import ProcessImage
from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.resources.content import ContentRecord
from ckpt.resources.credentials import CREDENTIALS
from ckpt.resources.files.descriptions import Description, FilesRecord
from ckpt.resources.files.open_file import may_read, may_write
from ckpt.resources.files.table import FILES
from ckpt.resources.filesystem import FILESYSTEM
from ckpt.resources.memory import MEMORY, MemoryRecord, VmaRecord
from ckpt.resources.sysv import SYSV
from ckpt.resources.sysv_record import SysvRecord
from ckpt.resources.threads import THREAD
from ckpt.resources.vmas import PROT_EXEC, PROT_READ, PROT_WRITE
from ckpt.units import AddrRange, RemoteAddr

_MAX_COMMAND_BYTES = 4096


@attrs.frozen(slots=True, eq=False, repr=False)
class Backing:
    """Where the pages of a mapping are in the image."""

    space: str
    shift: int
    """What is added to an address to get the one in that space."""

    def span(self, start: int, end: int) -> AddrRange:
        """Return the addresses in the space."""
        return AddrRange(RemoteAddr(start + self.shift), RemoteAddr(end + self.shift))


@attrs.frozen(slots=True)
class MappingView:
    """A mapping, with what the image holds of it."""

    start: int
    end: int
    access: str
    """As in /proc/PID/maps: `rw-p`."""
    offset_bytes: int
    name: str
    """A path, or as in /proc/PID/maps; empty if it has none."""
    stored_pages: int
    zero_pages: int
    file_pages: int
    """Still the file's own: not in the image."""
    backing: Backing | None = attrs.field(eq=False)
    """None: no page of it is in the image."""

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        return self.end - self.start


@attrs.frozen(slots=True)
class FileView:
    """A descriptor."""

    fd: int
    access: str
    """`r`, `w`, `u` (both), or `-`, as lsof has it."""
    kind: str
    name: str
    offset_bytes: int | None
    close_on_exec: bool
    description: int
    """Descriptors with the same number share one open file description."""


@attrs.frozen(slots=True)
class ThreadView:
    """A thread."""

    tid: int
    name: str


@attrs.frozen(slots=True, repr=False)
class ProcessView:
    """A process."""

    pid: int
    parent: int
    session: int
    group: int
    stopped: bool
    name: str
    command: tuple[str, ...]
    """Its arguments; empty if they are not to be found."""
    executable: str
    directory: str
    uid: int
    gid: int
    shares_memory_of: int
    """The pid of the process whose memory this is; 0: its own."""
    threads: tuple[ThreadView, ...]
    mappings: tuple[MappingView, ...]
    """Ascending."""
    files: tuple[FileView, ...]
    """Ascending."""

    @property
    def virtual_bytes(self) -> int:
        """How long all mappings are together."""
        return sum(one.size_bytes for one in self.mappings)

    @property
    def stored_pages(self) -> int:
        """How many pages of the mappings are in the image."""
        return sum(one.stored_pages for one in self.mappings)


def portray_all(examined: Examined, pid: int | None = None) -> list[ProcessView]:
    """Return all processes of a generation, or the one that is asked for.

    Raises:
        UsageError: there is no such process.
        ImageError: the image is damaged.
    """
    wanted = examined.tree.processes if pid is None else (examined.process(pid),)
    descriptions = _descriptions(examined)
    return [_portray(examined, one, descriptions) for one in wanted]


def _descriptions(examined: Examined) -> dict[int, Description]:
    return {
        one.id: one
        for process in examined.tree.processes
        for one in process.resources[FILES.name].descriptions
    }


def _portray(
    examined: Examined, process: ProcessImage, descriptions: Mapping[int, Description]
) -> ProcessView:
    memory: MemoryRecord = process.resources[MEMORY.name]
    threads = tuple(
        ThreadView(int(one.tid), os.fsdecode(one.resources[THREAD.name].name))
        for one in process.threads
    )
    ended = process.ended_leader
    first = process.threads[0]
    credentials = first.resources[CREDENTIALS.name]
    command = examined.command_line(process, _MAX_COMMAND_BYTES)
    mappings = [*_iter_mappings(examined, process), *_iter_attached(examined, process)]
    return ProcessView(
        pid=int(process.pid),
        parent=int(process.place.parent),
        session=int(process.place.session),
        group=int(process.place.group),
        stopped=bool(process.stopped_by),
        name=ended.comm if ended else _name_of(process.pid, threads),
        command=tuple(os.fsdecode(one) for one in command.rstrip(b"\0").split(b"\0") if one),
        executable=memory.exe.path,
        directory=process.resources[FILESYSTEM.name].cwd,
        uid=credentials.uids[1],
        gid=credentials.gids[1],
        shares_memory_of=int(process.shares.memory),
        threads=threads,
        mappings=tuple(sorted(mappings, key=lambda one: one.start)),
        files=tuple(_iter_files(process.resources[FILES.name], descriptions)),
    )


def _name_of(pid: int, threads: Sequence[ThreadView]) -> str:
    return next((one.name for one in threads if one.tid == pid), threads[0].name)


# -- memory ----------------------------------------------------------------------------------------


def _iter_mappings(examined: Examined, process: ProcessImage) -> Iterator[MappingView]:
    memory: MemoryRecord = process.resources[MEMORY.name]
    contents = [examined.content_of(file) for file in memory.files]
    resolved: dict[str, ResolvedRuns] = {}
    for vma in memory.vmas:
        backing = _backing_of(process, vma, contents)
        pages = dict.fromkeys(Fate, 0)
        if backing is not None:
            if backing.space not in resolved:
                resolved[backing.space] = examined.reader.resolve(backing.space)
            pages = resolved[backing.space].clip([backing.span(vma.start, vma.end)]).totals()
        yield MappingView(
            start=vma.start,
            end=vma.end,
            access=_access(vma.prot, shared=vma.shared),
            offset_bytes=vma.offset_bytes,
            name=_name_of_mapping(memory, vma, contents),
            stored_pages=pages[Fate.DATA],
            zero_pages=pages[Fate.ZERO],
            file_pages=pages[Fate.FILE],
            backing=backing,
        )


def _backing_of(
    process: ProcessImage, vma: VmaRecord, contents: Sequence[ContentRecord | None]
) -> Backing | None:
    if vma.has_own_pages:
        return Backing(process.space, 0)
    content = contents[vma.file] if vma.file >= 0 else None
    return Backing(content.space, vma.offset_bytes - vma.start) if content else None


def _access(prot: int, *, shared: bool) -> str:
    letters = ((PROT_READ, "r"), (PROT_WRITE, "w"), (PROT_EXEC, "x"))
    return "".join(letter if prot & bit else "-" for bit, letter in letters) + "ps"[shared]


def _name_of_mapping(
    memory: MemoryRecord, vma: VmaRecord, contents: Sequence[ContentRecord | None]
) -> str:
    if vma.file >= 0:
        deleted = contents[vma.file] and memory.files[vma.file].content
        return memory.files[vma.file].path + (" (deleted)" if deleted else "")
    if vma.special:
        return vma.special
    if vma.name:
        return vma.name
    mm = memory.mm
    if vma.start <= mm.start_stack < vma.end:
        return "[stack]"
    return "[heap]" if vma.start < mm.brk and mm.start_brk < vma.end else ""


def _iter_attached(examined: Examined, process: ProcessImage) -> Iterator[MappingView]:
    record: SysvRecord = process.resources[SYSV.name]
    segments = examined.segments()
    for one in record.attached:
        yield MappingView(
            start=one.start,
            end=one.end,
            access=_access(one.prot, shared=True),
            offset_bytes=one.offset_bytes,
            name=name_of_segment(segments.get(one.id)),
            stored_pages=0,
            zero_pages=0,
            file_pages=0,
            backing=None,
        )


# -- files -----------------------------------------------------------------------------------------


def _iter_files(record: FilesRecord, descriptions: Mapping[int, Description]) -> Iterator[FileView]:
    for entry in record.fds:
        # An image in which one is missing is refused when it is restored.
        description = descriptions.get(entry.description)
        if description is None:
            continue
        yield FileView(
            fd=entry.fd,
            access=_access_of_file(description.flags),
            kind=description.kind,
            name=description.shown,
            offset_bytes=getattr(description.record, "offset_bytes", None),
            close_on_exec=entry.close_on_exec,
            description=description.id,
        )


def _access_of_file(flags: int) -> str:
    reads, writes = may_read(flags), may_write(flags)
    return "u" if reads and writes else "r" if reads else "w" if writes else "-"
