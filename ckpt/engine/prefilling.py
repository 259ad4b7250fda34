"""A process under construction whose memory comes while its original still runs elsewhere.

The root's embryo is made from what a first look had told of it; anonymous memory is mapped where it
will lie, and filled as pages arrive, in the order in which they were copied: the last one stays.
When all is known, `resources/remapping` says which of it is as it must be. So what is left to do
does not grow with the memory.

    rounds     [heap          ]  [thread stacks]  [new   ]     mapped when pages for it come
    aside      files, what is shared: kept as frames, filled at the end
    at last    [heap               ] [stacks   ]   rescued     kept; or, if it was mapped otherwise
                                                               in the end, read and written again

Neighbours: `standing` takes the embryo over, `building` fills what is left.
"""

import contextlib
import os
import resource
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import attrs

from ckpt.engine.inheriting import stored
from ckpt.engine.layout import choose_arena, spans_of
from ckpt.engine.records import TreeImage
from ckpt.errors import RestoreFailed
from ckpt.image.runs import ResolvedRuns
from ckpt.kernel import process_vm
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features
from ckpt.kernel.pidfd import pidfd_open
from ckpt.process.remote import call
from ckpt.process.seed import ClockOffsets, Embryo, Nursery, plant
from ckpt.resources.base import Rebuilt, be_silent
from ckpt.resources.mapping_calls import bear
from ckpt.resources.memory import MEMORY, MemoryRecord, mappings_of
from ckpt.resources.registry import stays_in_ours
from ckpt.resources.remapping import Mapping, Pages, plan_pages, plan_remapping
from ckpt.resources.vmas import PROT_READ, PROT_WRITE, VmaRecord
from ckpt.tracker.spans import Spans, intersect, join, subtract
from ckpt.units import AddrRange, Fd, Pid, RemoteAddr

Piece = tuple[RemoteAddr, int, int]
"""Address, offset in a frame, length."""
_US_AT = Fd(3)
"""Where the embryo has a pidfd of ours: it takes what it inherits from us by that, at the end."""


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
            self._filled = join([*self._filled, *self._new])
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
        ahead = subtract(wanted, _near(self.aside, wanted))
        self._make_room(subtract(ahead, _near(self._room, wanted)))
        ahead = subtract(ahead, _near(self.aside, wanted))
        self._new += ahead
        pieces: list[Piece] = []
        for start, end, at in places:
            for first, last in intersect([(start, end)], ahead):
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

    def rescue(self, record: MemoryRecord, wanted: ResolvedRuns) -> None:
        """Read what is there, and will have to be mapped anew.

        Args:
            record: of the memory as it must be in the end.
            wanted: its pages.
        """
        keep = plan_remapping(self.mapped, mappings_of(record)).keep
        for start, end in subtract(intersect(self.there, stored(wanted)), keep):
            content = bytearray(end - start)
            span = AddrRange(RemoteAddr(start), RemoteAddr(end))
            if process_vm.readv(self.embryo.pid, [span], content) < len(content):
                raise RestoreFailed("filling memory ahead", f"no page at {start:#x} and after")
            self.rescued.append((start, bytes(content)))

    def plan_rest(self, wanted: ResolvedRuns, keep: Spans) -> Pages:
        """Return which pages must go, and which must come from frames that were kept."""
        pages = stored(wanted)
        right = intersect(self.there, pages)
        plan = plan_pages(keep, self.there, right, pages)
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


def _near(spans: Spans, wanted: Spans) -> Spans:
    """Return those of ascending spans that lie between the first and the last wanted."""
    first = bisect_right(spans, (wanted[0][0],)) - 1
    return spans[max(first, 0) : bisect_right(spans, (wanted[-1][1],))]


@attrs.define(repr=False)
class Ground:
    """What is there of a tree before all is known of it."""

    nursery: Nursery
    arena: AddrRange
    prefilled: Prefilled
    """Of the root."""

    def highest_on_the_way(self, n_fds: int) -> int:
        """Return which number is the highest that so many descriptors have before they are placed.

        They come to the lowest that are free; what they are moved to must lie above.
        """
        return n_fds + int(_US_AT)

    def begin(self, tree: TreeImage, fds: dict[Fd, Fd]) -> None:
        """Have the root take descriptors of ours, that it could not be born with.

        Args:
            tree: all of it, as it must be.
            fds: number there -> descriptor here.

        Raises:
            RestoreFailed: the tree cannot be built on this; or the kernel refused something.
        """
        root = self.nursery.root
        spans = [(v.start, v.end) for p in tree.processes for v in p.resources["memory"].vmas]
        taken = intersect(join(spans), [(int(self.arena.start), int(self.arena.end))])
        if tree.root.pid != root.number or taken:
            raise RestoreFailed("going on from what was prepared", "the tree has become another")
        step = "taking over descriptors"
        asked = [call(NR.pidfd_getfd, _US_AT, here, 0) for here in fds.values()]
        replies = root.run_checked(step, asked)
        moves = []
        for there, reply in zip(fds, replies, strict=True):
            moves.append(call(NR.dup3, reply.value, there, 0))
            moves.append(call(NR.close, reply.value))
        root.run_checked(step, [*moves, call(NR.close, _US_AT)])


@contextlib.contextmanager
def prepared(
    tree: TreeImage, features: Features, offsets: ClockOffsets | None
) -> Iterator[Ground | None]:
    """Make the embryo of a root ahead, with room for its memory; None where that cannot be.

    Args:
        tree: as it was when it was looked at.
        features: of this kernel.
        offsets: see `plant`.

    Raises:
        PidTaken: its number is in use.
        RestoreFailed: the kernel refused something.
    """
    record: MemoryRecord = tree.root.resources["memory"]
    if not stays_in_ours(tree.root.resources):
        yield None
        return
    vmas = [vma for one in tree.processes for vma in one.resources["memory"].vmas]
    arena_at = choose_arena(spans_of(vma.span for vma in vmas))
    # Its numbers for what it inherits will lie above those that the tree has, however many.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    us = pidfd_open(Pid(os.getpid()))
    try:
        with plant(tree.root.pid, {_US_AT: us}, offsets, arena_at) as nursery:
            ahead = tuple(vma for vma in record.vmas if vma.special or _comes_ahead(vma))
            aside = [(v.start, v.end) for v in record.vmas if not (v.special or _comes_ahead(v))]
            begun = attrs.evolve(record, vmas=ahead, guards=())
            _map(nursery.root, begun, features)
            prefilled = Prefilled(nursery.root, mappings_of(begun), join(aside))
            yield Ground(nursery, arena_at, prefilled)
    finally:
        os.close(us)


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
    with contextlib.suppress(StopIteration):
        calls = next(restoring)
        while True:
            calls = restoring.send(embryo.run(calls) if calls else [])
