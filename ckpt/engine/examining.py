"""One generation, opened to be looked at: no process of it is started, nothing is written.

For `core_file`, `differing` and `portrait`.
"""

import attrs

from ckpt.engine.records import ProcessImage, TreeImage, decode_tree
from ckpt.errors import ImageCorrupt, NoGeneration, UsageError
from ckpt.image.chain import Chain
from ckpt.image.reader import PageReader
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.sysvipc import SEGMENT_PATH
from ckpt.resources.content import CONTENTS, ContentKind, ContentRecord, ContentsRecord
from ckpt.resources.file_identity import FileIdentity
from ckpt.resources.memory import MEMORY, MemoryRecord
from ckpt.resources.sysv import SYSV
from ckpt.resources.sysv_record import SegmentRecord
from ckpt.units import AddrRange, GenerationNo, RemoteAddr


@attrs.frozen(slots=True, eq=False, repr=False)
class Examined:
    """A generation: its records, and what reads its pages."""

    reader: PageReader
    tree: TreeImage

    @property
    def generation(self) -> GenerationNo:
        """Its number."""
        return self.reader.manifest.generation

    def process(self, pid: int | None) -> ProcessImage:
        """Return one of its processes, the root for None.

        Raises:
            UsageError: it has no such process.
        """
        if pid is None:
            return self.tree.root
        for one in self.tree.processes:
            if one.pid == pid:
                return one
        known = ", ".join(str(one.pid) for one in self.tree.processes[:_SHOWN])
        more = ", ..." if len(self.tree.processes) > _SHOWN else ""
        raise UsageError(f"generation {self.generation} has no process {pid}: it has {known}{more}")

    def content_of(self, file: FileIdentity) -> ContentRecord | None:
        """Return the content of a mapped file, if the image holds it."""
        for one in self.tree.processes:
            record: ContentsRecord = one.resources[CONTENTS.name]
            for content in record.contents:
                # One that has its name, below /dev/shm, goes by that.
                named = content.kind == ContentKind.POSIX_SHM and content.path == file.path
                if named if not file.content else content.key == file.content:
                    return content
        return None

    def segments(self) -> dict[int, SegmentRecord]:
        """Return the System V segments that processes of the tree have attached, by their ids."""
        return {
            segment.id: segment
            for process in self.tree.processes
            for segment in process.resources[SYSV.name].segments
        }

    def command_line(self, process: ProcessImage, max_bytes: int) -> bytes:
        """Return the arguments of a process, as they are in its memory: a NUL behind each.

        Args:
            process: whose.
            max_bytes: where to cut it off.

        Returns:
            Nothing where it has unmapped them.

        Raises:
            ImageError: the image is damaged.
        """
        memory: MemoryRecord = process.resources[MEMORY.name]
        start = memory.mm.arg_start
        end = min(memory.mm.arg_end, start + max_bytes)
        if start >= end:
            return b""
        try:
            span = AddrRange(RemoteAddr(start), RemoteAddr(end))
            return self.reader.read(process.space, span)
        except ValueError:
            return b""


_SHOWN = 10


def name_of_segment(segment: SegmentRecord | None) -> str:
    """Return what /proc/PID/maps shows of an attached segment."""
    return f"{SEGMENT_PATH}{segment.first_key if segment else 0:08x} (deleted)"


def examine(chain: Chain, at: int | None) -> Examined:
    """Open generation `at` of a chain, None for the newest.

    Raises:
        NoGeneration: there is none of that number, or none at all.
        ImageError: it, or one that it is based on, is damaged or of a newer format.
    """
    number = chain.newest() if at is None else GenerationNo(at)
    if number is None:
        raise NoGeneration(str(chain.path), GenerationNo(0), "none yet")
    reader = PageReader(chain, number)
    path = str(chain.manifest_path(number))
    tree = decode_tree(reader.manifest, path)
    size = reader.manifest.page_size
    if size != arch.PAGE_SIZE:
        raise ImageCorrupt(path, f"its pages have {size} bytes, its mappings {arch.PAGE_SIZE}")
    return Examined(reader, tree)
