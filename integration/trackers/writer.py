"""All ways of changing memory at once, at full tilt: dumped at random moments, killed, restored.

The program (`workloads/writer.c`) knows what each of its cells must hold, in memory that is dumped
with them: a generation whose pages are not all of one moment does not pass its check.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from ckpt import DumpResult
from ckpt.engine.convergence import DEFAULT_BUDGET_MS
from integration.trackers.truth import Image
from integration.trackers.warm import Restored, dump, expect_ok
from integration.workloads.driver import Program


def run_writer(
    tracker: str,
    directory: Path,
    arguments: Sequence[str],
    *,
    n_deltas: int,
    n_restores: int,
    max_freeze_ms: float = DEFAULT_BUDGET_MS,
) -> list[DumpResult]:
    """Take a running writer through dumps, a kill and restores; return what the dumps said.

    Args:
        tracker: its name.
        directory: empty; the program leaves its file there.
        arguments: of the program.
        n_deltas: dumps after the first.
        n_restores: generations, chosen at random, that it must come back from.
        max_freeze_ms: of each dump.
    """
    chance = random.Random(f"{tracker} {arguments}")
    with Program("writer", *arguments, cwd=directory) as work:
        image = Image(directory / "image", work.pid)
        dumps = [dump(work.pid, image.directory, tracker, max_freeze_ms)]
        for _ in range(n_deltas):
            for _ in range(chance.randrange(3)):
                assert work.ask("step") == "stepped"
            dumps.append(dump(work.pid, image.directory, tracker, max_freeze_ms))
        expect_ok(work)
    delta = "full" if tracker == "full" else "delta"
    assert [made.kind for made in dumps] == ["full"] + [delta] * n_deltas
    for at in chance.sample(range(n_deltas + 1), n_restores):
        with Restored(image.directory, at) as work:
            expect_ok(work, f"generation {at}")
            assert work.ask("step") == "stepped"
            made = dump(work.pid, image.directory, tracker, max_freeze_ms)
            assert image.parent_of(made.generation) == (None if tracker == "full" else at)
            expect_ok(work)
    with Restored(image.directory) as work:
        expect_ok(work)
    return dumps


def table(dumps: Sequence[DumpResult]) -> str:
    """Return a line for each dump."""
    return "\n".join(
        f"{made.generation:3} {made.kind:5} data {made.pages.data:6} parent {made.pages.parent:6}"
        f" freeze {made.freeze_ms:6.1f} ms wall {made.wall_ms:7.1f} ms"
        f" rounds {len(made.rounds)} {made.reason}"
        for made in dumps
    )
