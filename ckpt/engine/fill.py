"""Filling a process under construction with the pages of an image, as quickly as the kernel can.

Threads read and decompress frame after frame and put each in place themselves:

    wide anonymous memory     UFFDIO_COPY: a new page is not zeroed before it is filled
    everything else           process_vm_writev, one call for all pieces of a frame: files;
                              scattered pages, since an ioctl for each would be a step of Python
                              for each; and memory that gets huge pages, which only a fault gives

A mapping is watched by a userfaultfd for the length of the filling and gets all its pages that way:
process_vm_writev would fault there and nobody would answer.
"""

import contextlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from ckpt.errors import CkptError, FeatureMissing, RestoreFailed
from ckpt.image.reader import PageReader, Piece
from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.kernel import process_vm, userfaultfd
from ckpt.kernel.libc import readable_address
from ckpt.kernel.userfaultfd import UFFDIO_REGISTER_MODE_MISSING, UffdFeature
from ckpt.process.seed import Embryo
from ckpt.process.userfault import make_inside
from ckpt.resources.memory import VmaRecord
from ckpt.tracker.spans import Spans, intersect
from ckpt.units import AddrRange, Fd, Pid, RemoteAddr

_WIDE_BYTES = 4 << 20
"""Stored bytes of a mapping from which on it is watched; below, the ioctls cost what they save."""
_LONG_RUN_BYTES = 32 << 10
"""How long its runs must be on average: an ioctl costs as much as zeroing about this much."""
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@attrs.frozen(slots=True, repr=False)
class Stored:
    """A mapping, and how much of it an image holds."""

    vma: VmaRecord
    n_bytes: int
    n_runs: int


def iter_stored(vmas: Sequence[VmaRecord], runs: ResolvedRuns) -> Iterator[Stored]:
    """Yield each mapping that has pages in the image; a run that spans two counts in the first."""
    starts = [vma.start for vma in vmas]
    n_bytes, n_runs = [0] * len(vmas), [0] * len(vmas)
    data = int(Fate.DATA)
    for start, n, fate in zip(runs.starts, runs.n_pages, runs.fates, strict=True):
        if fate == data:
            index = bisect_right(starts, start) - 1
            n_bytes[index] += n * runs.page_size
            n_runs[index] += 1
    for vma, total, n in zip(vmas, n_bytes, n_runs, strict=True):
        if n:
            yield Stored(vma, total, n)


def _gets_huge_pages(vma: VmaRecord) -> bool:
    if "hg" in vma.flags:
        return True
    try:
        always = "[always]" in _THP.read_text(encoding="ascii")
    except OSError:
        return False
    return always and "nh" not in vma.flags


def _is_worth_watching(stored: Stored, over: Spans) -> bool:
    vma = stored.vma
    return (
        vma.file < 0
        and vma.has_own_pages
        and stored.n_bytes >= max(_WIDE_BYTES, stored.n_runs * _LONG_RUN_BYTES)
        and not _gets_huge_pages(vma)
        and not intersect([(vma.start, vma.end)], over)
    )


class Watched:
    """Mappings that a userfaultfd watches, ascending; none if `fd` is None."""

    def __init__(self, pid: Pid, fd: Fd | None, spans: Sequence[AddrRange]) -> None:
        """Take what is registered already."""
        self.pid = pid
        self._fd = fd
        self._starts = [span.start for span in spans]
        self._ends = [span.end for span in spans]

    def put(self, raw: memoryview, pieces: list[Piece]) -> None:
        """Put the pieces of one frame in place.

        Raises:
            RestoreFailed: the kernel refused some of it.
        """
        others: list[Piece] = []
        if self._fd is None:
            others = pieces
        else:
            base, _ = readable_address(raw)
            for piece in pieces:
                for (address, offset, len_bytes), watched in self._iter_parts(piece):
                    if watched:
                        self._copy(self._fd, address, base + offset, len_bytes)
                    else:
                        others.append((address, offset, len_bytes))
        wanted = sum(len_bytes for _, _, len_bytes in others)
        if wanted and process_vm.writev(self.pid, others, raw) < wanted:
            raise RestoreFailed("filling memory", f"no page at {others[0][0]:#x} and after")

    def _iter_parts(self, piece: Piece) -> Iterator[tuple[Piece, bool]]:
        """Cut a piece at the ends of mappings; tell of each part whether it is watched."""
        address, offset, left = piece
        while left:
            index = bisect_right(self._starts, address) - 1
            watched = index >= 0 and address < self._ends[index]
            if watched:
                end = int(self._ends[index])
            else:
                end = self._starts[index + 1] if index + 1 < len(self._starts) else address + left
            taken = min(left, end - address)
            yield (RemoteAddr(address), offset, taken), watched
            address = RemoteAddr(address + taken)
            offset, left = offset + taken, left - taken

    def _copy(self, fd: Fd, address: int, source: int, len_bytes: int) -> None:
        done = 0
        while done < len_bytes:
            try:
                done += userfaultfd.copy(
                    fd, RemoteAddr(address + done), source + done, len_bytes - done, pid=self.pid
                )
            except OSError as error:
                raise RestoreFailed("filling memory", f"{address + done:#x}: {error}") from error


@contextlib.contextmanager
def _watched(
    embryo: Embryo, vmas: Sequence[VmaRecord], runs: ResolvedRuns, over: Spans
) -> Iterator[Watched]:
    wide = [one.vma.span for one in iter_stored(vmas, runs) if _is_worth_watching(one, over)]
    if not wide:
        yield Watched(embryo.pid, None, [])
        return
    try:
        fd = make_inside(
            embryo.pid,
            embryo.arena,
            embryo.leader,
            UffdFeature(0),
            user_faults_only=True,
            remedy="",
        )
    except FeatureMissing:
        yield Watched(embryo.pid, None, [])
        return
    try:
        yield Watched(embryo.pid, fd, list(_iter_registered(embryo.pid, fd, wide)))
    finally:
        # Nobody else has it, so nothing is watched any more.
        os.close(fd)


def _iter_registered(pid: Pid, fd: Fd, spans: Sequence[AddrRange]) -> Iterator[AddrRange]:
    for span in spans:
        with contextlib.suppress(OSError, CkptError):
            userfaultfd.register(fd, span, UFFDIO_REGISTER_MODE_MISSING, pid=pid)
            yield span


def fill(
    embryo: Embryo,
    reader: PageReader,
    runs: ResolvedRuns,
    vmas: Sequence[VmaRecord],
    over: Spans | None = None,
) -> None:
    """Write the stored pages of `runs`, of which each was checked, into the mapped embryo.

    Args:
        embryo: the process.
        reader: of the image.
        runs: what is written; nothing else may be there, but for `over`.
        vmas: all its mappings.
        over: pages that are there already, and are written over.

    Raises:
        RestoreFailed: the kernel refused some of it.
        ImageCorrupt: a frame does not decode.
    """
    with _watched(embryo, vmas, runs, over or []) as watched:
        reader.for_each_frame(runs, watched.put)
