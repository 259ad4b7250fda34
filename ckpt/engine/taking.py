"""What a dump takes of a tree, wherever it goes: the part in which the tree stands still.

freeze        all threads stop (`Taking.stop`)
  capture     registers and all resources, in one batch per process and thread
  twin        if the rest is too much for a freeze: a copy-on-write clone (`process/twin`)
  scan        what was written since the last round; the tracker is armed again
  copy        those pages, into buffers that were touched before
thaw
  copy        the rest, out of the twin

With `kill` the target stands still until whoever took it is done. Neighbours: `live` copies before
it, `dump` says what becomes of it.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial

import attrs

from ckpt import fault
from ckpt.engine.capture import (
    Capturing,
    Looked,
    capture_zombies,
    examine,
    finish_all,
    retarget,
    settle,
)
from ckpt.engine.contents import ContentCopy
from ckpt.engine.copying import Copy, DropEqual, Pool
from ckpt.engine.family import refuse_unplannable
from ckpt.engine.live import Outcome, Rounds
from ckpt.engine.members import Member, Members
from ckpt.engine.numbering import read_numbers, renumber
from ckpt.engine.pages import build_runs, own_mappings, spans_without_twin, untrusted_spans
from ckpt.engine.postponing import postpone
from ckpt.engine.records import ProcessImage, TreeImage
from ckpt.engine.sharing import Found, Sharing, Wanting
from ckpt.engine.stream import all_copied, find_newest
from ckpt.engine.taken import Taken
from ckpt.engine.tracking import attach_each
from ckpt.image.reader import PageReader
from ckpt.image.runs import RunTable
from ckpt.kernel import ptrace
from ckpt.kernel.features import Features
from ckpt.process.arena import Arena, arenas
from ckpt.process.freezer import FrozenTree, freeze_tree
from ckpt.process.leftovers import find_leftovers, remove_leftovers
from ckpt.process.twin import Twin, cost_ms, find_obstacle, twin
from ckpt.process.urgent import urgently
from ckpt.resources.base import CaptureOptions, Target, run_all
from ckpt.resources.content import NOTE, likely_bytes
from ckpt.resources.memory import MemoryRecord
from ckpt.tracker.base import Scan, TrackerName
from ckpt.tracker.spans import Spans, intersect, subtract, total_bytes
from ckpt.units import Pid

_BEGIN_COMPARING_MS = 1.0
"""What copying must cost at least, for comparing to be done after the thaw."""
_WORTH_TELLING_BYTES = 1 << 20


@attrs.define(repr=False, slots=False)
class Part:
    """What one process contributes."""

    member: Member
    image: ProcessImage
    twin: Twin | None
    scan: Scan = attrs.field(init=False)
    first: Spans = attrs.Factory(list)
    """What was read before the thaw."""
    left: Spans = attrs.Factory(list)
    """Mappings that are not copied at all: whoever takes the tree reads them where it stands."""
    _seen: bool = False

    @property
    def memory(self) -> MemoryRecord:
        """Its address space."""
        memory: MemoryRecord = self.image.resources["memory"]
        return memory

    @property
    def aside(self) -> Spans:
        """What of its memory the twin does not have."""
        return spans_without_twin(self.memory) if self.twin else []

    @cached_property
    def rest(self) -> Spans:
        """What was not copied yet, by the last scan; what is read later changes nothing of it.

        Held pages are told of a scan only once: it would call those dirty that were read since.
        """
        self.see()
        return subtract(self.member.held.missing(self.scan), self.left)

    def see(self) -> None:
        """Forget of what is held what was written, by the last scan."""
        if not self._seen:
            self._seen = True
            self.member.held.see(self.scan, untrusted_spans(self.memory))


_STORED_WHOLE = (
    "what has no name (shared memory, deleted files) was stored whole: to compare it with an"
    " encrypted checkpoint takes --identity"
)


@attrs.define(repr=False)
class Taking:
    """One dump under way."""

    looked: Looked
    members: Members
    copy: Copy
    parent: PageReader | None
    """Reads the generation that a delta is made against."""
    kill: bool
    max_freeze_ms: float
    freeze_timeout_s: float
    stopped_ms: float = 0.0
    """How long the target stood still so far."""
    stores_once: bool = True
    """What processes share is stored for one of them."""
    leave: Callable[[TreeImage], Mapping[Pid, Spans]] | None = None
    """Says, of a tree that is to be killed, which mappings need not be copied if they are big."""
    sharing: Sharing = attrs.field(init=False)
    obstacle: str = ""
    """Why a process could not be cloned, if that was wanted."""
    warnings: list[str] = attrs.Factory(list)

    def __attrs_post_init__(self) -> None:
        """Nothing is shared yet."""
        self.sharing = Sharing(self.copy, self.members.features, self.stores_once)

    @property
    def root(self) -> Pid:
        """The process that all others descend from."""
        return self.members.root

    @property
    def features(self) -> Features:
        """What this kernel can do."""
        return self.members.features

    @property
    def compares(self) -> bool:
        """Whether each page is compared with what the parent holds of it."""
        return self.parent is not None and self.members.tracker is TrackerName.COMPARE

    def remove_leftovers(self) -> None:
        """Remove what a killed ckpt has left in the target, which is stopped only if there is any.

        Raises:
            UnsupportedState, TargetError, HostFull: as `look_again`, `stop` and `arenas`.
        """
        pids = list(self.members.by_pid)
        if not any(map(find_leftovers, pids)):
            return
        with self._stop_urgently() as tree:
            remove_leftovers([tree.processes[pid] for pid in pids if pid in tree.processes])
        self.look_again()

    def rounds(self) -> Rounds:
        """Return what copies while the target runs."""
        return Rounds(
            members=self.members,
            copy=self.copy,
            stop=self._stop_urgently,
            look=self.look_again,
            page_size=self.copy.page_size,
            sharing=self.sharing,
        )

    def look_again(self, options: CaptureOptions | None = None) -> None:
        """Look at the target anew, for the freeze to confirm.

        Args:
            options: instead of those of the look before.

        Raises:
            UnsupportedState: it has come to own what cannot be captured.
        """
        looked = examine(self.root, self.features, options or self.looked.tree.options)
        self.looked.tree.forget()
        self.looked = looked

    def forget(self) -> None:
        """Close what the last look has opened."""
        self.looked.tree.forget()

    @contextlib.contextmanager
    def take(
        self, outcome: Outcome, captured: Callable[[TreeImage], None] | None = None
    ) -> Iterator["Taken"]:
        """Freeze the tree and take what the rounds have left; lend all of it.

        Args:
            outcome: of the rounds.
            captured: called with all but the memory, before that is copied; of a tree that is to be
                killed.

        State:  unless it is to be killed, the tree runs again when this has been lent; its clones
                are gone. Else it stands still until the end of the block.

        Raises:
            UnsupportedState: it owns what cannot be captured.
            TargetGone: it ended.
        """
        # And as much again, for what is written until the freeze.
        pool = Pool(2 * outcome.rest.n_bytes)
        self.sharing.prepare(outcome.rest.n_bytes, len(self.members.by_pid))
        n_likely_bytes = likely_bytes(self.looked.tree.notes)
        contents = ContentCopy(self.copy, self._comparable(n_likely_bytes), n_likely_bytes)
        with (
            contextlib.ExitStack() as at_end,
            _without_gc(),
            contextlib.ExitStack() as twins,
            contextlib.ExitStack() as urgent,
            contextlib.ExitStack() as stack,
        ):
            urgent.enter_context(urgently())
            frozen = stack.enter_context(self.stop())
            fault.reach("dump-frozen")
            targets = retarget(frozen, self.looked, self.features)
            tree = targets[self.root].tree
            stack.callback(run_all, tree.at_thaw)
            at_end.callback(run_all, tree.at_end)
            wanted = twins if self._wants_twin(outcome) else None
            images, parts = self._capture(frozen, targets, wanted)
            fault.reach("dump-captured")
            zombies = capture_zombies(frozen, tree)
            numbers = read_numbers(frozen)
            refuse_unplannable(images, zombies)
            image = TreeImage(images, zombies)
            if captured is not None:
                image = settle(image)
                captured(image)
            leave = self.leave(image) if self.leave else {}
            n_bytes = self._copy_frozen(parts, pool, leave)
            contents.read(tree.notes.get(NOTE, ()))
            fault.reach("dump-copied")
            if not self.kill:
                stack.close()
                fault.reach("dump-thawed")
            urgent.close()
            self.copy.store_all()
            self._copy_twins(parts, pool)
            twins.close()
            contents.store()
            fault.reach("dump-stored")
            if not outcome.fits:
                self._warn_of(n_bytes)
            if captured is None:
                image = settle(image)
            spaces = partial(self._build_tables, image, contents)
            held = {space: one.held.pages for space, one in self._of_spaces(image).items()}
            if numbers is not None:
                image = renumber(image, numbers)
            fault.reach("dump-settled")
            left = (
                (one.member.space, one.member.pid, intersect(one.scan.populated, one.left))
                for one in parts
            )
            yield Taken(frozen, tree, image, held | contents.held(), spaces, tuple(left))

    def preview(self) -> TreeImage:
        """Stop the tree for a moment and return all but its memory; nothing is copied.

        Raises:
            UnsupportedState: it owns what cannot be captured.
            TargetGone: it ended.
        """
        with contextlib.ExitStack() as at_end, _without_gc(), contextlib.ExitStack() as stack:
            frozen = stack.enter_context(self.stop())
            targets = retarget(frozen, self.looked, self.features)
            tree = targets[self.root].tree
            stack.callback(run_all, tree.at_thaw)
            at_end.callback(run_all, tree.at_end)
            images, _ = self._capture(frozen, targets, None)
            zombies = capture_zombies(frozen, tree)
            refuse_unplannable(images, zombies)
        return settle(TreeImage(images, zombies))

    @contextlib.contextmanager
    def stop(self) -> Iterator[FrozenTree]:
        """Freeze the target for the length of the block, and count how long that was."""
        trace = ptrace.Option.NONE
        if "sys_admin" in self.features.capabilities:
            trace |= ptrace.Option.SUSPEND_SECCOMP
        with freeze_tree(self.root, trace, self.freeze_timeout_s) as frozen:
            yield frozen
        self.stopped_ms += frozen.freeze_ms

    @contextlib.contextmanager
    def _stop_urgently(self) -> Iterator[FrozenTree]:
        with urgently(), self.stop() as frozen:
            yield frozen

    def _wants_twin(self, outcome: Outcome) -> bool:
        """Tell whether clones would stop the target for less long than copying the rest."""
        if self.kill:
            return False
        clone_ms = sum(cost_ms(total_bytes(one.likely)) for one in self.members.by_pid.values())
        if self.compares:
            # Reading what the parent holds takes longer than anything else.
            return outcome.rest.copy_ms > _BEGIN_COMPARING_MS
        return not outcome.fits and clone_ms < outcome.rest.copy_ms

    def _capture(
        self,
        frozen: FrozenTree,
        targets: Mapping[Pid, Target],
        twins: contextlib.ExitStack | None,
    ) -> tuple[tuple[ProcessImage, ...], list[Part]]:
        """Capture all resources; clone the processes if there is where to keep the clones.

        Returns the images of all, and what is under way of those that have memory of their own.
        """
        # All that can be read from outside first, while no process has a mapping of ours.
        capturing = {pid: Capturing(one, targets[pid]) for pid, one in frozen.processes.items()}
        of_memory = targets[self.root].tree.memory_owners()
        owners = [pid for pid in frozen.processes if pid not in of_memory]
        self.members.keep_only(owners)
        members = {pid: self.members.by_pid.get(pid) or self.members.add(pid) for pid in owners}
        each = frozen.processes.values()
        fault.reach("dump-read")
        with arenas([(one.pid, one.tgid, one.leader) for one in each], of_memory) as lent:
            fault.reach("dump-arenas")
            images = finish_all(capturing, lent)
            fault.reach("dump-called")
            attach_each(
                (members[arena.pid].tracking, arena, frozen.processes[arena.pid].leader)
                for arena in lent
                if arena.pid in members
            )
            fault.reach("dump-attached")
            parts = {
                pid: Part(members[pid], image, None)
                for pid, image in zip(frozen.processes, images, strict=True)
                if image.has_memory
            }
            if twins is not None:
                self._clone(frozen, images, parts, lent, twins)
        return tuple(images), list(parts.values())

    def _clone(
        self,
        frozen: FrozenTree,
        images: list[ProcessImage],
        parts: Mapping[Pid, Part],
        lent: list[Arena],
        twins: contextlib.ExitStack,
    ) -> None:
        """Clone those processes that will not notice, nor will their ancestors."""
        adopting: set[Pid] = set()
        for image, arena in zip(images, lent, strict=True):
            # Each is behind its parent.
            adopts = (
                image.resources["identity"].child_subreaper
                or frozen.parents.get(arena.pid) in adopting
            )
            if adopts:
                adopting.add(arena.pid)
            part = parts.get(arena.pid)
            if part is None:
                continue
            obstacle = find_obstacle(frozen.processes[arena.pid], adopts_orphans=adopts)
            if not obstacle:
                part.twin = twins.enter_context(twin(arena, frozen.processes[arena.pid]))
                fault.reach("dump-cloned")
            if part.twin is None:
                self.obstacle = obstacle or "the kernel refused to clone it"

    def _copy_frozen(self, parts: list[Part], pool: Pool, leave: Mapping[Pid, Spans]) -> int:
        """Scan all for the last time, and read what no clone has.

        Returns how many bytes that were, of the processes that have no clone.
        """
        for part in parts:
            own = own_mappings(part.memory)
            part.scan = part.member.tracking.collect(own, part.member.likely)
            part.left = postpone(leave.get(part.image.pid, []), part.scan.populated)
        fault.reach("dump-armed")
        if self.sharing.is_unsettled:
            for part in parts:
                part.see()
            self.sharing.settle([part.member for part in parts])
        found = self._look([(one, one.member.pid, one.rest) for one in parts if one.twin is None])
        n_bytes = 0
        for part in parts:
            pid = part.member.pid
            if part.twin is None:
                alone, shared = found.left_of(part.member, part.rest)
                n_bytes += total_bytes(alone) + total_bytes(shared)
                self._read(part.member, pid, alone, pool)
                self._read(part.member, pid, shared, pool, gently=True)
            elif part.aside:
                part.first = intersect(part.rest, part.aside)
                self._read(part.member, pid, part.first, pool)
        self.sharing.confirm(found, running=False)
        return n_bytes

    def _copy_twins(self, parts: list[Part], pool: Pool) -> None:
        """Read the rest out of the clones; what there is to read is found out only now."""
        asked = [
            (part, part.twin.pid, subtract(part.rest, part.first))
            for part in parts
            if part.twin is not None
        ]
        self.sharing.prepare(sum(total_bytes(wanted) for _, _, wanted in asked), len(asked))
        found = self._look(asked)
        for part, pid, wanted in asked:
            # All that a clone has it shares with what it was cloned from.
            for left in found.left_of(part.member, wanted):
                self._read(part.member, pid, left, pool, gently=True)
        self.sharing.confirm(found, running=False)
        self.copy.store_all()
        if self.compares:
            for part in parts:
                # What was not copied is as the parent has it.
                part.member.held.add(part.scan.populated)

    def _comparable(self, n_likely_bytes: int) -> PageReader | None:
        """Return what holds old pages of files without a name, if it can be read."""
        if self.parent is None or self.parent.is_open:
            return self.parent
        if n_likely_bytes:
            self.warnings.append(_STORED_WHOLE)
        return None

    def _look(self, asked: Sequence[tuple[Part, Pid, Spans]]) -> Found:
        """Return what processes that stand still, or clones of them, share."""
        wanting = [Wanting(part.member, pid, rest) for part, pid, rest in asked]
        # What is equal to what the parent has of a process is not stored: nobody can share it.
        return self.sharing.look(wanting, guess=not self.compares)

    def _read(
        self, member: Member, pid: Pid, wanted: Spans, pool: Pool, *, gently: bool = False
    ) -> None:
        """Read pages of a member, or of what has its memory; see `Copy.read_whole`."""
        drop = None
        parent = self.parent if self.compares else None
        if parent is not None and member.space in parent.manifest.spaces:
            drop = DropEqual(parent, member.space)
        if wanted:
            copied = self.copy.read_whole(member.space, pid, wanted, pool, drop, gently=gently)
            member.held.add(copied)

    def _build_tables(self, image: TreeImage, contents: ContentCopy) -> dict[str, RunTable]:
        processes = {process.pid: process for process in image.processes}
        memory = {
            space: self._build_runs(processes[member.number], member)
            for space, member in self._of_spaces(image).items()
        }
        return memory | contents.tables()

    def _of_spaces(self, image: TreeImage) -> dict[str, Member]:
        """Return whose memory each page space is; the numbers are ours."""
        members = {one.number: one for one in self.members.by_pid.values()}
        having = [members[process.pid] for process in image.processes if process.has_memory]
        return {member.space: member for member in having}

    def _build_runs(self, process: ProcessImage, member: Member) -> RunTable:
        """Return where each page of a process is."""
        stream, page_size = self.copy.stream, self.copy.page_size
        in_parent: Spans = []
        copied = member.held.pages
        if self.parent is not None:
            copied, in_parent = member.held.tell_apart(all_copied(stream, member.space))
        copies = find_newest(stream, member.space, copied, page_size)
        return build_runs(process.resources["memory"], copies, in_parent, page_size)

    def _warn_of(self, n_bytes: int) -> None:
        """Say that so much was copied while the target stood, if it was more than wanted."""
        if self.kill or n_bytes < _WORTH_TELLING_BYTES:
            return
        why = "it writes faster than it is copied"
        if self.obstacle:
            why = f"there was no clone of it to copy from, since {self.obstacle}"
        self.warnings.append(
            f"{n_bytes >> 20} MiB were copied while the process stood still, more than fits into"
            f" {self.max_freeze_ms:g} ms: {why}"
        )


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Let no garbage collection of ours fall into the freeze."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
