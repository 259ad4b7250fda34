"""One way of changing memory at a time, through dumps, a kill and restores; for any tracker.

After each step, or a few, of a case (`workloads.catalog.TRACKER_CASES`) a delta is taken, and then

    the image, resolved, holds what the process has in memory       nothing is missing
    each page that the program names as written is in the delta     it is not there by chance
    what the delta holds beyond that can be explained               `Case.allowed`

The program is killed; it comes back from the newest and from an older generation, judges itself,
goes on, and the next dump continues the generation that it came back from.

What a delta may hold beyond changed pages, measured on 6.1, 6.12 and 6.18:

- a few pages of the program's own (stack, buffers) that it wrote with the bytes that were there;
- zeros: pages that were only read, or that a collapse into a huge page made. Not counted;
- soft-dirty bits only: a mapping that grows or merges with a new neighbour is dirty as a whole
  (brk, and what is mapped beside it), and a huge page has one bit for its 512 pages.
"""

import os
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import attrs

from ckpt import DumpResult, Features
from ckpt.engine.convergence import DEFAULT_BUDGET_MS
from integration.trackers.truth import PAGE, Image, settle_on_one_cpu
from integration.trackers.warm import Restored, dump, expect_ok
from integration.workloads.catalog import TRACKER_CASES
from integration.workloads.driver import Dialogue, Program

OWN_PAGES = 16
"""Pages that a program may write with the bytes that are there: never more than 12 were seen."""
MERGED = {"t_remap_same": 64, "t_brk_stack": 256, "t_first_touch": 256, "t_thp": 1024}
"""Case -> pages of mappings that merge or are huge: dirty together under soft-dirty."""

CASES = sorted(TRACKER_CASES)


def offered(features: Features) -> list[str]:
    """Return the trackers that a kernel with these features offers."""
    kernel = {"softdirty": features.soft_dirty, "writeprotect": features.uffd_wp_async}
    return [*(name for name, has in kernel.items() if has), "compare", "full"]


@attrs.frozen
class Changes:
    """What the program says that it changed: addresses of pages."""

    written: set[int]
    gone: set[int]
    freed: set[int]
    moved: set[int]

    @classmethod
    def ask(cls, work: Dialogue) -> "Changes":
        """Take what has changed since this was asked last."""
        found: dict[str, set[int]] = {}
        for word in work.ask("written").split():
            if word in attrs.fields_dict(cls):
                pages = found[word] = set()
            else:
                pages.add(int(word, 16))
        return cls(**found)

    def then(self, later: "Changes") -> "Changes":
        """Return what both together come to."""
        written = set() if later.moved else self.written - later.gone - later.freed
        return Changes(
            written | later.written,
            self.gone | later.gone,
            (self.freed - later.written) | later.freed,
            self.moved | later.moved,
        )


@attrs.frozen
class Row:
    """One delta, for the tables that tests print."""

    steps: str
    n_written: int
    n_data: int
    n_same: int
    n_zeros: int
    freeze_ms: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.steps:12} written {self.n_written:4} stored {self.n_data:4}"
            f" unchanged {self.n_same:4} zeros {self.n_zeros:4} freeze {self.freeze_ms:6.1f} ms"
        )


@attrs.define
class Run:
    """A case under way: one process, one image directory, one tracker."""

    case: str
    tracker: str
    work: Dialogue
    image: Image
    max_freeze_ms: float = DEFAULT_BUDGET_MS
    vanishing: set[int] = attrs.Factory(set)
    rows: list[Row] = attrs.Factory(list)

    @property
    def holds_still(self) -> bool:
        """Tell whether the program does nothing between two commands."""
        return self.case != "t_full_speed"

    @property
    def allowed(self) -> int:
        """Return how many unchanged pages a delta may hold."""
        merged = MERGED.get(self.case, 0) if self.tracker == "softdirty" else 0
        return OWN_PAGES + merged

    def settle(self) -> None:
        if self.holds_still:
            settle_on_one_cpu(self.image.pid)

    def dump(self) -> DumpResult:
        """Dump, and hold the image against the process."""
        result = dump(self.image.pid, self.image.directory, self.tracker, self.max_freeze_ms)
        if self.holds_still:
            assert self.image.differences(result.generation, self.vanishing) == []
        return result

    def step(self, *names: str) -> DumpResult:
        """Let the program do these steps, dump, and judge the delta."""
        changes = reduce(Changes.then, map(self.change, names))
        result = self.dump()
        stored = self.image.stored(result.generation)
        written = changes.written & stored.mapped
        assert written <= stored.data, "a page was written and is not in the delta"
        n = [len(pages) for pages in (written, stored.data, stored.same, stored.zeros)]
        self.rows.append(Row(" ".join(names), *n, result.freeze_ms))
        if self.holds_still:
            assert len(stored.same) <= self.allowed, self.rows[-1]
        expected = "full" if self.tracker == "full" or "exec" in names else "delta"
        assert result.kind == expected, result.reason
        if "exec" in names and self.tracker != "full":
            assert "exec" in result.reason
        return result

    def change(self, step: str) -> Changes:
        """Let the program do one step and say what it changed."""
        assert self.work.ask(f"step {step}") == "stepped"
        if self.case == "t_foreign_write":
            change_from_outside(self.work, self.image.pid)
        changes = Changes.ask(self.work)
        self.vanishing = (self.vanishing | changes.freed) - changes.written
        return changes

    def check(self) -> None:
        expect_ok(self.work)


def change_from_outside(work: Dialogue, pid: int) -> None:
    """Fill a page of the program as a debugger would, and tell it what it will find."""
    address, length, pattern = work.ask("where").split()
    for page in (5, int(length) // PAGE - 7):
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            at = int(address, 16) + page * PAGE
            assert os.pwrite(memory.fileno(), bytes([int(pattern, 16)]) * PAGE, at) == PAGE
        assert work.ask(f"expect {pattern} {page}") == "expected"


def run_case(
    case: str,
    tracker: str,
    directory: Path,
    stretches: Sequence[Sequence[str]],
    *,
    older: Sequence[int] = (),
    go_on: bool = True,
    max_freeze_ms: float = DEFAULT_BUDGET_MS,
) -> list[Row]:
    """Take a case through all of it; return what each delta held.

    Args:
        case: of `CASES`.
        tracker: its name.
        directory: empty; programs leave their files there.
        stretches: each ends with a delta: steps of the case.
        older: generations that are restored beside the newest.
        go_on: whether what was restored does a step and is dumped again.
        max_freeze_ms: of each dump.
    """
    with Program("tracker_cases", case, cwd=directory) as work:
        run = Run(case, tracker, work, Image(directory / "image", work.pid), max_freeze_ms)
        run.settle()
        Changes.ask(work)
        first = run.dump()
        assert first.kind == "full"
        assert first.tracker == tracker
        for steps in stretches:
            newest = run.step(*steps).generation
        run.check()
    for at in (None, *older):
        with Restored(run.image.directory, at) as work:
            run.work = work
            run.check()
            if go_on:
                _go_on(run, newest if at is None else at, TRACKER_CASES[case][0])
    return run.rows


def _go_on(run: Run, restored: int, step: str) -> None:
    """The next dump of a restored process is a delta on the generation that it came from."""
    run.settle()
    run.vanishing |= Changes.ask(run.work).freed
    result = run.dump()
    parent = run.image.parent_of(result.generation)
    assert parent == (None if run.tracker == "full" else restored), result.reason
    run.step(step)
    run.check()


SECOND_DIRECTORY = {
    "softdirty": ("full", "a dump into another image directory came in between"),
    "writeprotect": ("full", "a dump into another image directory came in between"),
    # They look at the very generation, so whoever dumped meanwhile does not matter to them.
    "compare": ("delta", ""),
    "full": ("full", "the tracker 'full' knows of no unchanged page"),
}


def run_with_second_directory(tracker: str, directory: Path) -> None:
    """Dump into another directory in between: what the tracker then knows is of that one."""
    with Program("tracker_cases", "t_write", cwd=directory) as work:
        settle_on_one_cpu(work.pid)
        run = Run("t_write", tracker, work, Image(directory / "image", work.pid))
        other = attrs.evolve(run, image=Image(directory / "other", work.pid))
        run.dump()
        run.change("many")
        assert other.dump().kind == "full"
        for each in (run, other):
            run.change("many")
            result = each.dump()
            assert (result.kind, result.reason) == SECOND_DIRECTORY[tracker]
        run.change("many")
        assert other.dump().kind == ("full" if tracker == "full" else "delta")
        run.check()
    for each in (run, other):
        with Restored(each.image.directory) as work:
            expect_ok(work)
