"""A process under construction whose memory comes while its original still runs elsewhere.

Its embryo is made from what a first look had told of it; anonymous memory is mapped where it will
lie, and filled as pages arrive, in the order in which they were copied: the last one stays. When
all is known, `resources/remapping` says which of it is as it must be. So what is left to do does
not grow with the memory.

    rounds     [heap          ]  [thread stacks]  [new   ]     mapped when pages for it come
    aside      files, what is shared: kept as frames, filled at the end
    at last    [heap               ] [stacks   ]   rescued     kept; or, if it was mapped otherwise
                                                               in the end, read and written again

Neighbours: `ground` has those of a whole tree, `building` fills what is left.
"""

from collections.abc import Sequence

import attrs

from ckpt.engine.rebuilding import Rebuilding, run_in_rounds
from ckpt.errors import RestoreFailed
from ckpt.kernel import process_vm
from ckpt.kernel.features import Features
from ckpt.process.seed import Embryo
from ckpt.resources.base import Rebuilt, be_silent
from ckpt.resources.mapping_calls import bear
from ckpt.resources.memory import MEMORY, MemoryRecord, mappings_of
from ckpt.resources.remapping import Mapping, Pages, plan_pages, plan_remapping
from ckpt.resources.vmas import PROT_READ, PROT_WRITE, VmaRecord
from ckpt.tracker.spans import Spans, intersect, join, near, subtract, unite
from ckpt.units import AddrRange, RemoteAddr

Piece = tuple[RemoteAddr, int, int]
"""Address, offset in a frame, length."""


@attrs.define(repr=False)
class Prefilled:
    """The memory of one process under construction."""

    embryo: Embryo
    mapped: list[Mapping]
    aside: Spans
    """Addresses of what is not filled ahead."""
    rescued: list[tuple[int, bytes]] = attrs.Factory(list)
    """What has to be written again, by address."""
    _filled: Spans = attrs.Factory(list)
    _new: list[tuple[int, int]] = attrs.Factory(list)
    _room: Spans = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """See where pages can be put."""
        self._room = join((one.start, one.end) for one in self.mapped)

    @property
    def there(self) -> Spans:
        """All pages that were put there."""
        if self._new:
            self._filled = unite(self._filled, join(self._new))
            self._new = []
        return self._filled

    def plan(self, places: Sequence[tuple[int, int, int]]) -> list[Piece]:
        """Return which pages of one frame go where, mapped if need be; the others come at the end.

        Args:
            places: start, end, and offset in the frame; those of one frame have no page in common.
        """
        wanted = join((start, end) for start, end, _ in places)
        if not wanted:
            return []
        ahead = subtract(wanted, near(self.aside, wanted))
        self._make_room(subtract(ahead, near(self._room, wanted)))
        ahead = subtract(ahead, near(self.aside, wanted))
        self._new += ahead
        if ahead == wanted:
            return [(RemoteAddr(start), at, end - start) for start, end, at in places]
        pieces: list[Piece] = []
        for start, end, at in places:
            place = [(start, end)]
            for first, last in intersect(place, near(ahead, place)):
                pieces.append((RemoteAddr(first), at + first - start, last - first))
        return pieces

    def _make_room(self, missing: Spans) -> None:
        """Map what was not there when it was looked at; where that fails, pages come at the end."""
        if not missing:
            return
        vmas = [_anonymous(start, end) for start, end in missing]
        replies = self.embryo.run([bear(vma, -1) for vma in vmas])
        for vma, reply in zip(vmas, replies, strict=True):
            if reply.ok:
                anonymous = (False, None, frozenset[str]())
                self.mapped.append(Mapping(vma.start, vma.end, anonymous, None, _WRITABLE))
            else:
                self.aside = join([*self.aside, (vma.start, vma.end)])
        self.mapped.sort(key=lambda one: one.start)
        self._room = join((one.start, one.end) for one in self.mapped)

    def put(self, raw: memoryview, pieces: list[Piece]) -> None:
        """Write the pages of one frame; safe in any thread, for frames of one round.

        Raises:
            RestoreFailed: the kernel refused some of it.
        """
        wanted = sum(len_bytes for _, _, len_bytes in pieces)
        if process_vm.writev(self.embryo.pid, pieces, raw) < wanted:
            raise RestoreFailed("filling memory ahead", f"no page at {pieces[0][0]:#x} and after")

    def rescue(self, record: MemoryRecord, wanted: Spans) -> None:
        """Read what is there, and will have to be mapped anew.

        Args:
            record: of the memory as it must be in the end.
            wanted: its pages.
        """
        keep = plan_remapping(self.mapped, mappings_of(record)).keep
        self._read(intersect(subtract(self.there, keep), wanted))

    def move_out(self, wanted: Spans) -> None:
        """Read all that is there: the process will be made anew, and its memory written again.

        Args:
            wanted: its pages, as they must be in the end.
        """
        self._read(intersect(self.there, wanted))
        self.mapped, self._room, self._filled, self._new = [], [], [], []

    def _read(self, spans: Spans) -> None:
        for start, end in spans:
            content = bytearray(end - start)
            span = AddrRange(RemoteAddr(start), RemoteAddr(end))
            if process_vm.readv(self.embryo.pid, [span], content) < len(content):
                raise RestoreFailed("filling memory ahead", f"no page at {start:#x} and after")
            self.rescued.append((start, bytes(content)))

    def plan_rest(self, wanted: Spans, keep: Spans) -> Pages:
        """Return which pages must go, and which must come from frames that were kept."""
        right = intersect(self.there, wanted)
        plan = plan_pages(keep, self.there, right, wanted)
        ours = join((start, start + len(content)) for start, content in self.rescued)
        return attrs.evolve(plan, write=subtract(plan.write, ours))

    def put_back(self) -> None:
        """Write what was rescued, when it is mapped as it must be.

        Raises:
            RestoreFailed: the kernel refused some of it.
        """
        for start, content in self.rescued:
            self.put(memoryview(content), [(RemoteAddr(start), 0, len(content))])


_WRITABLE = PROT_READ | PROT_WRITE


def _anonymous(start: int, end: int) -> VmaRecord:
    return VmaRecord(start, end, _WRITABLE, False, "", -1, 0, (), "")


def prefilled(embryo: Embryo, record: MemoryRecord, features: Features) -> Prefilled:
    """Map what can be filled ahead, and nothing else.

    Args:
        embryo: of the process.
        record: of its memory, as it was when it was looked at.
        features: of this kernel.

    Raises:
        RestoreFailed: the kernel refused some of it.
    """
    ahead = tuple(vma for vma in record.vmas if vma.special or _comes_ahead(vma))
    aside = [(v.start, v.end) for v in record.vmas if not (v.special or _comes_ahead(v))]
    begun = attrs.evolve(record, vmas=ahead, guards=())
    _map(embryo, begun, features)
    return Prefilled(embryo, mappings_of(begun), join(aside))


def _comes_ahead(vma: VmaRecord) -> bool:
    return not vma.shared and vma.file < 0


def _map(embryo: Embryo, record: MemoryRecord, features: Features) -> None:
    rebuilt = Rebuilt(
        embryo=embryo,
        task=embryo.leader,
        features=features,
        inherited={},
        fill=lambda _keep: None,
        warn=be_silent,
    )
    restoring = MEMORY.restore(record, rebuilt)
    run_in_rounds([Rebuilding(embryo, embryo.leader, restoring, embryo.pid)])
