"""A process of an image as an ELF core file, which a debugger opens; nothing is started.

    headers | notes | mapping | mapping | ...      holes where memory is zero
              `core_notes`   `core_segments`, `core_memory`

The memory of the image goes straight to its place in the file, frame by frame as it lies on disk,
so that what is needed of our own memory does not grow with the process.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs

from ckpt.engine.core_memory import CoreMemory, iter_mapped_files
from ckpt.engine.core_notes import pack_notes
from ckpt.engine.core_segments import Places, Segment, held_bytes, plan_segments
from ckpt.engine.examining import examine
from ckpt.errors import HostFull, UsageError
from ckpt.image.chain import Chain
from ckpt.kernel.elf_core import PSARGS_BYTES, PT_LOAD, Elf64_Phdr, headers_size, pack_headers
from ckpt.kernel.libc import PAGE_SIZE
from ckpt.units import Fd, Pid


@attrs.frozen(slots=True)
class Exported:
    """What was written."""

    path: Path
    generation: int
    pid: Pid
    n_threads: int
    size_bytes: int
    """Length of the file; with holes it takes less."""
    warnings: tuple[str, ...]


ReportDone = Callable[[int], None]


def export_core(
    chain: Chain,
    path: Path | None = None,
    *,
    at: int | None = None,
    pid: int | None = None,
    report: ReportDone | None = None,
) -> Exported:
    """Write one process of a generation into a core file, which appears when it is complete.

    Args:
        chain: where from.
        path: the file; one that is there is replaced. `core.PID` if not given.
        at: the generation, the newest if not given.
        pid: the process, the root of the tree if not given.
        report: called with the number of bytes of memory that are written.

    Raises:
        UsageError: there is no such process, or the file cannot be made.
        ImageError: the image is damaged, of a newer format, or has no such generation.
        HostFull: no room for the file.
    """
    examined = examine(chain, at)
    process = examined.process(pid)
    path = path or Path(f"core.{process.pid}")
    memory = CoreMemory(examined, process)
    segments = plan_segments((area.vma, area.parts) for area in memory.areas)
    command_line = examined.command_line(process, PSARGS_BYTES)
    notes = pack_notes(process, command_line, list(iter_mapped_files(examined, process)))
    notes_at = headers_size(len(segments))
    memory_at = -(-(notes_at + len(notes)) // PAGE_SIZE) * PAGE_SIZE
    size_bytes = memory_at + held_bytes(segments)
    loads = [_load(segment, memory_at) for segment in segments]
    head, tail = pack_headers((notes_at, len(notes)), loads, size_bytes)
    with _new_file(path) as fd:
        os.truncate(fd, size_bytes)
        _write(fd, head + notes, 0)
        _write(fd, tail, size_bytes)
        memory.copy(_Sink(fd, memory_at, segments, report))
    return Exported(
        path,
        examined.generation,
        process.pid,
        len(process.threads),
        size_bytes + len(tail),
        tuple(memory.warnings),
    )


def _load(segment: Segment, memory_at: int) -> Elf64_Phdr:
    return Elf64_Phdr(
        p_type=PT_LOAD,
        p_flags=segment.flags,
        p_offset=memory_at + segment.offset,
        p_vaddr=segment.start,
        p_filesz=segment.held_end - segment.start,
        p_memsz=segment.end - segment.start,
        p_align=PAGE_SIZE,
    )


class _Sink:
    """Puts memory where it belongs in the file."""

    def __init__(
        self, fd: Fd, memory_at: int, segments: Sequence[Segment], report: ReportDone | None
    ) -> None:
        self._fd = fd
        self._memory_at = memory_at
        self._places = Places(segments)
        self._report = report
        self._done_bytes = 0

    def __call__(self, address: int, content: memoryview) -> None:
        for offset, at, len_bytes in self._places.iter_parts(address, len(content)):
            _write(self._fd, content[at : at + len_bytes], self._memory_at + offset)
        self._done_bytes += len(content)
        if self._report:
            self._report(self._done_bytes)


def _write(fd: Fd, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Fd]:
    """Lend a descriptor of a file that only its owner can read; it gets its name at the end."""
    import tempfile

    temporary = ""
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path} is no regular file: give -o another name")
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            yield Fd(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        temporary = ""
    except OSError as error:
        what = f"cannot write {path} ({error.strerror})"
        if error.errno in _FULL:
            raise HostFull(what=what, remedy="write it elsewhere (-o FILE)") from error
        raise UsageError(what) from error
    finally:
        if temporary:
            os.unlink(temporary)
