"""The memory of a process for its core file: what of each mapping there is, and from where.

    mapping                          its pages are
    private                          in the image; what is still a file's own, from that
    shared, of a content             in the image: anonymous, memfd, deleted, below /dev/shm
    shared, of a file with a name    left to the file
    attached segment (System V)      among the records of the image
    vdso                             our own kernel's, if its code is the same
    vvar, MADV_DONTDUMP              not in a core file, as in those of the kernel

A file that the process mapped counts if it is what it was (`file_identity`); of one that is not,
what the image does not hold is missing, and the user is told.
"""

import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator

import attrs

from ckpt.engine.core_segments import Mapped, Part, iter_private_parts
from ckpt.engine.examining import Examined, name_of_segment
from ckpt.engine.records import ProcessImage
from ckpt.errors import ImageCorrupt, UsageError
from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.elf_core import ELF_MAGIC, MappedFile
from ckpt.kernel.procfs import maps
from ckpt.process import memory as process_memory
from ckpt.resources.content import ContentRecord
from ckpt.resources.file_identity import FileIdentity, describe_change
from ckpt.resources.memory import MEMORY, MemoryRecord, VmaRecord, digest_of_vdso
from ckpt.resources.sysv import SYSV
from ckpt.resources.sysv_record import AttachmentRecord, DataRecord, SegmentRecord
from ckpt.tracker.spans import Spans, join
from ckpt.units import AddrRange, Pid, RemoteAddr

Sink = Callable[[int, memoryview], None]
"""Takes the content of some addresses, by the first of them."""

_CHUNK_BYTES = 1 << 20
_VDSO = "[vdso]"
_DELETED = b" (deleted)"
_NOT_DUMPED = "dd"
"""VmFlags of what the process does not want to be in a core file (MADV_DONTDUMP)."""


@attrs.frozen(slots=True, eq=False, repr=False)
class Area:
    """One mapping: which parts of it a core file holds."""

    vma: Mapped
    parts: list[Part]


class CoreMemory:
    """The memory of one process of a generation."""

    def __init__(self, examined: Examined, process: ProcessImage) -> None:
        """Look at all mappings, and at the files behind them; no page is read.

        Raises:
            ImageError: the pages cannot be resolved.
        """
        self._examined = examined
        self._process = process
        self._memory: MemoryRecord = process.resources[MEMORY.name]
        self._runs = examined.reader.resolve(process.space)
        self._contents = [examined.content_of(file) for file in self._memory.files]
        self._changes = [
            "" if content else describe_change(file)
            for file, content in zip(self._memory.files, self._contents, strict=True)
        ]
        self._vdso = _own_vdso(self._memory)
        self.warnings: list[str] = []
        """What of files is missing."""
        self._own: list[AddrRange] = []
        """Private mappings: their pages are in the space of the process."""
        self._copies: list[Callable[[Sink], None]] = []
        """Put in place what is under the process's own pages."""
        self.areas = sorted(
            [*map(self._area, self._memory.vmas), *self._iter_attached()],
            key=lambda area: area.vma.start,
        )
        """All mappings, ascending."""

    def copy(self, sink: Sink) -> None:
        """Hand all that the core file holds, but zeros, to `sink`.

        Raises:
            ImageError: a frame is damaged.
            OSError: a file cannot be read, or what the sink raises.
        """
        for copy in self._copies:
            copy(sink)
        for raw, pieces in self._examined.reader.iter_data(self._process.space, self._own):
            for address, offset, len_bytes in pieces:
                sink(address, raw[offset : offset + len_bytes])

    def _area(self, vma: VmaRecord) -> Area:
        if _NOT_DUMPED in vma.flags and not vma.special:
            return Area(vma, [(vma.start, vma.end, False)])
        if vma.special:
            return Area(vma, [(vma.start, vma.end, self._takes_vdso(vma))])
        if vma.shared:
            content = self._contents[vma.file] if vma.file >= 0 else None
            if content is not None:
                self._note(vma, [(vma.start, vma.end)])
            return Area(vma, [(vma.start, vma.end, content is not None)])
        self._own.append(vma.span)
        runs = self._runs.clip([vma.span])
        parts = list(
            iter_private_parts(
                vma,
                runs,
                file_is_here=vma.file >= 0 and self._is_here(vma, runs),
                has_elf_header=self._has_elf_header(vma),
            )
        )
        if vma.file >= 0:
            self._note(vma, list(_iter_held_of_file(runs, parts)))
        return Area(vma, parts)

    def _takes_vdso(self, vma: VmaRecord) -> bool:
        code = self._vdso
        if vma.special != _VDSO or len(code) != vma.end - vma.start:
            return False
        self._copies.append(lambda sink: sink(vma.start, memoryview(code)))
        return True

    def _is_here(self, vma: VmaRecord, runs: ResolvedRuns) -> bool:
        """Tell whether what is still the file's own can be read; if not, say so once."""
        change = self._changes[vma.file]
        if change and any(fate == Fate.FILE for fate in runs.fates):
            path = self._memory.files[vma.file].path
            sentence = f"{path} {change}: what is its own in memory is not in the core file"
            if sentence not in self.warnings:
                self.warnings.append(sentence)
        return not change

    def _has_elf_header(self, vma: VmaRecord) -> bool:
        if vma.file < 0 or vma.offset_bytes or self._contents[vma.file]:
            return False
        if self._changes[vma.file]:
            return False
        return _read_start(self._memory.files[vma.file]) == ELF_MAGIC

    def _note(self, vma: VmaRecord, spans: Spans) -> None:
        """Copy what lies in `spans` from the file behind a mapping."""
        if not spans:
            return
        content = self._contents[vma.file]
        if content is not None:
            self._copies.append(lambda sink: self._copy_content(vma, content, spans, sink))
        else:
            file = self._memory.files[vma.file]
            self._copies.append(lambda sink: _copy_file(vma, file, spans, sink))

    def _copy_content(
        self, vma: VmaRecord, content: ContentRecord, spans: Spans, sink: Sink
    ) -> None:
        shift = vma.start - vma.offset_bytes
        wanted = [
            AddrRange(RemoteAddr(start - shift), RemoteAddr(end - shift)) for start, end in spans
        ]
        for raw, pieces in self._examined.reader.iter_data(content.space, wanted):
            for offset_in_file, offset, len_bytes in pieces:
                sink(offset_in_file + shift, raw[offset : offset + len_bytes])

    def _iter_attached(self) -> Iterator[Area]:
        segments = self._examined.segments()
        for one in self._process.resources[SYSV.name].attached:
            segment = segments.get(one.id) if one.end <= arch.USER_END else None
            yield Area(one, [(one.start, one.end, segment is not None)])
            if segment is not None:
                self._copies.append(self._copier_of_segment(one, segment))

    def _copier_of_segment(
        self, one: AttachmentRecord, segment: SegmentRecord
    ) -> Callable[[Sink], None]:
        def copy(sink: Sink) -> None:
            for data in segment.data:
                raw = self._unpack(data)
                shift = data.offset_bytes - one.offset_bytes
                skipped = max(-shift, 0)
                stop = max(one.end - one.start - shift, 0)
                sink(one.start + shift + skipped, memoryview(raw)[skipped:stop])

        return copy

    def _unpack(self, data: DataRecord) -> bytes:
        try:
            return zlib.decompressobj().decompress(data.packed, data.len_bytes)
        except zlib.error as error:
            path = self._examined.reader.chain.manifest_path(self._examined.generation)
            raise ImageCorrupt(str(path), f"a System V segment does not unpack: {error}") from error


def _iter_held_of_file(runs: ResolvedRuns, parts: Iterable[Part]) -> Iterator[tuple[int, int]]:
    """Yield what a core file holds of a private mapping that is still the file's own."""
    held = join((start, end) for start, end, is_held in parts if is_held)
    for clipped in runs.clip([AddrRange(RemoteAddr(a), RemoteAddr(b)) for a, b in held]):
        if clipped.fate == Fate.FILE:
            yield clipped.start, clipped.start + clipped.n_pages * runs.page_size


def _own_vdso(record: MemoryRecord) -> bytes:
    """Return the vdso of our own process if the code is that of the image's, else nothing."""
    ourselves = Pid(os.getpid())
    vmas = list(maps.read_maps(ourselves))
    if not record.vdso or digest_of_vdso(ourselves, vmas) != record.vdso:
        return b""
    spans = (vma.span for vma in vmas if vma.path == _VDSO)
    return b"".join(process_memory.read(ourselves, one.start, one.len_bytes) for one in spans)


def _open(file: FileIdentity) -> int:
    """Open a file by the name that an image gives it: it may be anything by now.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "not a regular file", file.path)
    return fd


def _read_start(file: FileIdentity) -> bytes:
    try:
        fd = _open(file)
    except OSError:
        return b""
    try:
        return os.pread(fd, len(ELF_MAGIC), 0)
    finally:
        os.close(fd)


def _copy_file(vma: VmaRecord, file: FileIdentity, spans: Spans, sink: Sink) -> None:
    """Copy from a file; what lies behind its end is zero.

    Raises:
        UsageError: it cannot be read any more.
    """
    try:
        fd = _open(file)
    except OSError as error:
        raise UsageError(f"cannot read {file.path} ({error.strerror})") from error
    try:
        for start, end in spans:
            while start < end:
                wanted = min(end - start, _CHUNK_BYTES)
                chunk = os.pread(fd, wanted, start - vma.start + vma.offset_bytes)
                if not chunk:
                    break
                sink(start, memoryview(chunk))
                start += len(chunk)
    finally:
        os.close(fd)


def iter_mapped_files(examined: Examined, process: ProcessImage) -> Iterator[MappedFile]:
    """Yield what NT_FILE tells, ascending."""
    memory: MemoryRecord = process.resources[MEMORY.name]
    segments = examined.segments()
    yield from sorted(
        [
            *(
                (vma.start, vma.end, vma.offset_bytes, _name_of(memory.files[vma.file]))
                for vma in memory.vmas
                if vma.file >= 0
            ),
            *(
                (
                    one.start,
                    one.end,
                    one.offset_bytes,
                    name_of_segment(segments.get(one.id)).encode(),
                )
                for one in process.resources[SYSV.name].attached
            ),
        ]
    )


def _name_of(file: FileIdentity) -> bytes:
    name = os.fsencode(file.path)
    return name + _DELETED if file.content else name
