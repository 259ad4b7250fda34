"""The rounds before the freeze: memory is copied while the target runs, until little is left.

    arm         the tracker says what exists and what was written since it was armed; arms again
    copy        what the image does not hold yet, or no more; the target goes on writing
    estimate    how much was written meanwhile: another round, or the freeze?
    look        once little is left: again at all that is not memory, for that was seconds ago

A page that is written after it was armed is found by the next scan, whenever it was read; so what a
round reads may be half old and half new, and is stored for nothing then. A tracker that would miss
what is written during its scan is asked while the target is stopped. One that must be told which
mappings to watch is told in a short stop before the first round; what is mapped later is copied in
each round, and told in the freeze.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import attrs

from ckpt import fault
from ckpt.engine.convergence import Policy, Rest, Round, Verdict
from ckpt.engine.copying import Copy, Pool
from ckpt.engine.members import Member, Members
from ckpt.engine.pages import read_own_mappings
from ckpt.engine.sharing import Sharing, Wanting
from ckpt.engine.throttle import slowed
from ckpt.engine.tracking import attach_each
from ckpt.errors import TargetGone
from ckpt.process.arena import arenas
from ckpt.process.clones import find_memory_owners
from ckpt.process.freezer import Frozen, FrozenTree
from ckpt.process.tree import is_zombie, list_tids
from ckpt.tracker.base import LIVE, TELLING, Scan
from ckpt.tracker.populated import opened_pagemap, scan_populated
from ckpt.tracker.spans import Spans, subtract, total_bytes
from ckpt.units import Pid

_BEGIN_MS = 1.0
_BEGIN_THREAD_MS = 0.1
"""What a stop costs that only prepares the tracker, and for each thread."""
_LIVE_POOL_BYTES = 32 << 20

T = TypeVar("T")

Stop = Callable[[], AbstractContextManager[FrozenTree]]


@attrs.frozen(repr=False)
class Outcome:
    """How the rounds ended."""

    rounds: tuple[Round, ...]
    rest: Rest
    """What is left for the freeze, as far as can be told before it."""
    fits: bool
    """Whether that can be copied within the budget."""


@attrs.define(repr=False)
class Rounds:
    """The live part of one dump."""

    members: Members
    copy: Copy
    stop: Stop
    """Freezes the tree, for what cannot be done while it runs."""
    look: Callable[[], None]
    """Looks at all but the memory again, so that the freeze has only to confirm it."""
    page_size: int
    sharing: Sharing
    _rounds: list[Round] = attrs.Factory(list)
    _rests: list[Rest] = attrs.Factory(list)

    def run(self, policy: Policy | None) -> Outcome:
        """Copy until it is time to freeze; without a policy, that is at once."""
        if policy is None:
            return Outcome((), self._estimate(), fits=True)
        verdict = self._decide(policy)
        if verdict is not Verdict.FREEZE and self.members.tracker in TELLING:
            pool = Pool(_LIVE_POOL_BYTES)
            self.sharing.prepare(self._rests[-1].n_bytes, len(self.members.by_pid))
            self._watch()
            if self._shrink(pool, verdict, policy) is Verdict.FREEZE:
                self.look()
                # What was written while we looked is copied too, if it is worth it.
                self._rests.clear()
                self._shrink(pool, self._decide(policy), policy)
        rest = self._rests[-1]
        return Outcome(tuple(self._rounds), rest, policy.fits(rest))

    def _shrink(self, pool: Pool, verdict: Verdict, policy: Policy) -> Verdict:
        while verdict is Verdict.COPY:
            self._copy_all(pool, policy.throttle)
            verdict = self._decide(policy)
        return verdict

    def _decide(self, policy: Policy) -> Verdict:
        self._rests.append(self._estimate())
        begin_ms = 0.0 if self._rounds else _BEGIN_MS + _BEGIN_THREAD_MS * self._count_threads()
        return policy.decide(self._rests, self._rounds, begin_ms=begin_ms)

    def _count_threads(self) -> int:
        return sum(len(list_tids(member.pid)) for member in self._each())

    def _each(self) -> Iterator[Member]:
        """Walk the members that still live."""
        for member in list(self.members.by_pid.values()):
            if is_zombie(member.pid):
                self.members.drop_if_ended(member.pid, TargetGone(member.pid))
            else:
                yield member

    def _on_each(self, work: Callable[[Member], T]) -> list[T]:
        """Do something with every member; one that ends meanwhile is left out."""
        results = []
        for member in self._each():
            try:
                results.append(work(member))
            except TargetGone as error:
                self.members.drop_if_ended(member.pid, error)
        return results

    def _estimate(self) -> Rest:
        """Return what a freeze would have to copy now."""
        rests = self._on_each(self._estimate_one)
        return Rest(sum(rest.n_runs for rest in rests), sum(rest.n_bytes for rest in rests))

    def _estimate_one(self, member: Member) -> Rest:
        own = read_own_mappings(member.pid)
        if not self._rounds:
            with opened_pagemap(member.pid) as fd:
                member.likely = scan_populated(fd, own, self.members.features)
        left = subtract(member.likely, member.held.pages)
        if member.held.pages:
            # Otherwise nothing is there that could have been written since.
            left = left + member.tracking.peek(own)
        return Rest(len(left), total_bytes(left))

    def _watch(self) -> None:
        """Stop the tree for what the rounds need: a descriptor of its own, mappings watched."""
        if self.members.tracker not in LIVE or all(self._on_each(_watches_all)):
            return
        with self.stop() as tree:
            fault.reach("dump-watching")
            # What has come since the look may share memory too.
            known = self.members.by_pid.keys() == tree.processes.keys()
            of_memory = {} if known else find_memory_owners(tuple(tree.processes))
            each = [
                (self.members.by_pid.get(pid) or self.members.add(pid), frozen)
                for pid, frozen in tree.processes.items()
                if pid not in of_memory
            ]
            _attach_all(each)
            for member, frozen in each:
                member.tracking.watch(read_own_mappings(frozen.pid))
        fault.reach("dump-watched")

    def _copy_all(self, pool: Pool, throttle: float) -> None:
        started_s = time.monotonic()
        # Other trackers stop the target themselves, which two cannot do at once.
        with slowed(self.stop, throttle if self.members.tracker in LIVE else 0.0):
            n_bytes = self._copy_round(pool)
        ms = (time.monotonic() - started_s) * 1000
        self._rounds.append(Round(n_bytes // self.page_size, ms))
        fault.reach("dump-round")

    def _copy_round(self, pool: Pool) -> int:
        scans = dict(self._on_each(self._ask))
        asked = [one for one in self.members.by_pid.values() if one.pid in scans]
        self.sharing.settle(asked)
        wanting = [Wanting(one, one.pid, one.held.missing(scans[one.pid])) for one in asked]
        found = self.sharing.look(wanting)
        left = {one.pid: found.left_of(one.member, one.wanted) for one in wanting}
        n_bytes = sum(self._on_each(lambda member: self._copy(member, left, pool)))
        self.sharing.confirm(found, running=True)
        return n_bytes

    def _ask(self, member: Member) -> tuple[Pid, Scan]:
        """Ask what was written, and forget that it was held."""
        running = self.members.tracker in LIVE
        with nullcontext() if running else self.stop():
            own = read_own_mappings(member.pid)
            scan = member.tracking.collect(own, member.likely, running=running)
        fault.reach("dump-asked")
        member.likely = scan.populated
        member.held.see(scan, [])
        return member.pid, scan

    def _copy(self, member: Member, left: Mapping[Pid, tuple[Spans, Spans]], pool: Pool) -> int:
        n_bytes = 0
        for wanted, gently in zip(left.get(member.pid, ([], [])), (False, True), strict=True):
            if wanted:
                space, pid = member.space, member.pid
                copied = self.copy.read_running(space, pid, wanted, pool, gently=gently)
                member.held.add(copied)
                n_bytes += total_bytes(copied)
        return n_bytes


def _watches_all(member: Member) -> bool:
    own = read_own_mappings(member.pid)
    return member.tracking.is_attached and member.tracking.watches_all(own)


def _attach_all(each: Iterable[tuple[Member, Frozen]]) -> None:
    missing = []
    for member, frozen in each:
        member.tracking.follow_exec()
        if not member.tracking.is_attached:
            missing.append((member.tracking, frozen))
    with arenas([(one.pid, one.tgid, one.leader) for _, one in missing]) as lent:
        attach_each(
            (tracking, arena, one.leader)
            for (tracking, one), arena in zip(missing, lent, strict=True)
        )
