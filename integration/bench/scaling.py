"""How cost grows: one kind of thing at a time, in five sizes. `plots.py` draws what this measures.

For each axis and tool a straight line is laid through the medians; where cost is linear, it fits.
"""

import functools
import statistics
from collections.abc import Iterator, Sequence

import attrs

from integration.bench.cycle import Case, measure
from integration.bench.objects import object_case
from integration.bench.report import Collector, summary
from integration.bench.target import start_target
from integration.bench.tools import Bench

MEASURES = ("freeze", "wall", "restore")
_ROUNDS = 3


@attrs.frozen
class Axis:
    """What is made more of."""

    name: str
    label: str
    unit: str
    """One of them."""
    sizes: Sequence[int]

    def cases(self) -> Iterator[tuple[int, Case]]:
        """Yield each size and its case."""
        for n in self.sizes:
            if self.name == "memory":
                start = functools.partial(start_target, mib=n)
                yield n, Case(f"{n} MiB", start, n, _ROUNDS)
            else:
                kind = {"vmas": "VMAs"}.get(self.name, self.name)
                yield n, object_case(kind, n, _ROUNDS)


AXES = {
    axis.name: axis
    for axis in (
        Axis("memory", "MiB of random memory", "MiB", (64, 256, 512, 768, 1024)),
        Axis("threads", "threads", "thread", (10, 125, 250, 375, 500)),
        Axis("vmas", "VMAs", "VMA", (100, 2500, 5000, 7500, 10_000)),
        Axis("fds", "open files", "file", (10, 250, 500, 750, 1000)),
    )
}


def measure_axis(bench: Bench, axis: Axis) -> dict[str, object]:
    """Return the values of an axis as JSON takes them: measure -> tool -> points and line."""
    into = Collector()
    cases = list(axis.cases())
    for _, case in cases:
        measure(bench, case, into)
    found: dict[str, object] = {}
    for name in MEASURES:
        found[name] = {}
        for tool in bench.tools:
            points = [(n, into.values(case.name, name, tool.name)) for n, case in cases]
            points = [(n, values) for n, values in points if values]
            if len(points) > 1:
                found[name] |= {tool.name: _describe(points)}  # type: ignore[operator]
    return {"label": axis.label, "unit": axis.unit, "measures": found, "notes": into.notes}


def _describe(points: Sequence[tuple[int, Sequence[float]]]) -> dict[str, object]:
    sizes = [float(n) for n, _ in points]
    medians = [statistics.median(values) for _, values in points]
    slope, start = statistics.linear_regression(sizes, medians)
    # How much of the variation the line explains; a constant has none.
    flat = len(set(medians)) == 1
    fit = 1.0 if flat else statistics.correlation(sizes, medians) ** 2
    return {
        "points": [{"n": n, **summary(values)} for n, values in points],
        "line": {"ms_each": slope, "ms_at_0": start, "r2": fit},
    }
