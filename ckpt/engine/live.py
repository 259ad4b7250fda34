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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import attrs

from ckpt.engine.convergence import Rest, Verdict, decide
from ckpt.engine.copying import Copy, Pool
from ckpt.engine.pages import Held, read_own_mappings
from ckpt.engine.tracking import Tracking
from ckpt.kernel.features import Features
from ckpt.process.arena import arena
from ckpt.process.freezer import Frozen
from ckpt.tracker.base import LIVE, TELLING
from ckpt.tracker.populated import opened_pagemap, scan_populated
from ckpt.tracker.spans import Spans, subtract, total_bytes

_BEGIN_MS = 1.0
_BEGIN_THREAD_MS = 0.1
"""What a stop costs that only prepares the tracker, and for each thread."""
_LIVE_POOL_BYTES = 32 << 20

Stop = Callable[[], AbstractContextManager[Frozen]]


@attrs.frozen
class Round:
    """One round of copying while the target ran."""

    n_pages: int
    ms: float


@attrs.frozen(repr=False)
class Outcome:
    """How the rounds ended."""

    rounds: tuple[Round, ...]
    rest: Rest
    """What is left for the freeze, as far as can be told before it."""
    fits: bool
    """Whether that can be copied within the budget."""
    likely: Spans
    """Pages that existed at the end."""


@attrs.define(repr=False)
class Rounds:
    """The live part of one dump."""

    tracking: Tracking
    features: Features
    copy: Copy
    held: Held
    stop: Stop
    """Freezes the target, for what cannot be done while it runs."""
    look: Callable[[], None]
    """Looks at all but the memory again, so that the freeze has only to confirm it."""
    n_threads: int
    page_size: int
    _likely: Spans = attrs.Factory(list)
    _rounds: list[Round] = attrs.Factory(list)
    _rests: list[Rest] = attrs.Factory(list)

    def run(self, budget_ms: float | None) -> Outcome:
        """Copy until it is time to freeze; without a budget, that is at once."""
        if budget_ms is None:
            return Outcome((), self._estimate(), fits=True, likely=self._likely)
        verdict = self._decide(budget_ms)
        if verdict is not Verdict.FREEZE and self.tracking.name in TELLING:
            pool = Pool(_LIVE_POOL_BYTES)
            self._watch()
            if self._shrink(pool, verdict, budget_ms) is Verdict.FREEZE:
                self.look()
                # What was written while we looked is copied too, if it is worth it.
                self._rests.clear()
                self._shrink(pool, self._decide(budget_ms), budget_ms)
        rest = self._rests[-1]
        return Outcome(tuple(self._rounds), rest, rest.copy_ms <= budget_ms, self._likely)

    def _shrink(self, pool: Pool, verdict: Verdict, budget_ms: float) -> Verdict:
        while verdict is Verdict.COPY:
            self._copy(pool)
            verdict = self._decide(budget_ms)
        return verdict

    def _decide(self, budget_ms: float) -> Verdict:
        self._rests.append(self._estimate())
        begin_ms = 0.0 if self._rounds else _BEGIN_MS + _BEGIN_THREAD_MS * self.n_threads
        return decide(self._rests, budget_ms=budget_ms, begin_ms=begin_ms)

    def _estimate(self) -> Rest:
        """Return what a freeze would have to copy now."""
        own = read_own_mappings(self.tracking.pid)
        if not self._rounds:
            with opened_pagemap(self.tracking.pid) as fd:
                self._likely = scan_populated(fd, own, self.features)
        left = subtract(self._likely, self.held.pages)
        if self.held.pages:
            # Otherwise nothing is there that could have been written since.
            left = left + self.tracking.peek(own)
        return Rest(len(left), total_bytes(left))

    def _watch(self) -> None:
        """Stop the target for what the rounds need: a descriptor of its own, mappings watched."""
        if self.tracking.name not in LIVE or self._watches_all():
            return
        with self.stop() as frozen:
            self.tracking.follow_exec()
            if not self.tracking.is_attached:
                with arena(frozen.pid, frozen.tgid, frozen.leader) as lent:
                    self.tracking.attach(lent, frozen.leader)
            self.tracking.watch(read_own_mappings(self.tracking.pid))

    def _watches_all(self) -> bool:
        own = read_own_mappings(self.tracking.pid)
        return self.tracking.is_attached and self.tracking.watches_all(own)

    def _copy(self, pool: Pool) -> None:
        started_s = time.monotonic()
        own = read_own_mappings(self.tracking.pid)
        running = self.tracking.name in LIVE
        with nullcontext() if running else self.stop():
            scan = self.tracking.collect(own, self._likely, running=running)
        self._likely = scan.populated
        copied = self.copy.read_running(self.tracking.pid, self.held.see(scan, []), pool)
        self.held.add(copied)
        ms = (time.monotonic() - started_s) * 1000
        self._rounds.append(Round(total_bytes(copied) // self.page_size, ms))
