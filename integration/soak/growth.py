"""What processes and directories hold, taken again and again; and whether it has grown.

    series = Series()
    series.take({"redis: fds": 18, ...})                 once after every dump
    growths(series)                                      a sentence for each that has grown

What is counted must not change at all once all is warm. What an allocator gives back when it likes
(memory, mappings of a Python process) is judged by medians: those of a window at the end may be
above those of an early one by as much as `ALLOWED` says, however many dumps lie in between.
"""

import os
import statistics
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

ALLOWED: dict[str, float] = {
    "redis: KiB": 2048,
    "redis: mappings": 1,
    "ckpt: KiB": 4096,
    "ckpt: mappings": 4,
    "chain: KiB": 2048,
}
"""How much more the median may be at the end; all else may not change."""

_WARM_UP = 0.25
_WINDOW = 0.15


@attrs.frozen
class Grown:
    """One figure, early and late."""

    name: str
    early: float
    late: float
    lowest: float
    """Of all once warm, as `highest`."""
    highest: float

    @property
    def is_growth(self) -> bool:
        if self.name in ALLOWED:
            return self.late - self.early > ALLOWED[self.name]
        return self.lowest != self.highest

    def __str__(self) -> str:
        spread = f"{self.lowest:g} to {self.highest:g}"
        return f"{self.name}: {self.early:g} early, {self.late:g} late ({spread})"


class Series:
    """Figures by name, one of each for every dump; itself it takes 8 bytes for each."""

    def __init__(self) -> None:
        self._figures: dict[str, array[float]] = {}

    def take(self, figures: Mapping[str, float]) -> None:
        for name, figure in figures.items():
            self._figures.setdefault(name, array("d")).append(figure)

    def __iter__(self) -> Iterator[Grown]:
        for name, figures in self._figures.items():
            warm = figures[int(len(figures) * _WARM_UP) :]
            n_window = max(1, int(len(figures) * _WINDOW))
            yield Grown(
                name,
                statistics.median(warm[:n_window]),
                statistics.median(warm[-n_window:]),
                min(warm),
                max(warm),
            )

    def medians(self, name: str) -> tuple[float, float]:
        """Return those of the first and the last window; nothing is left out for warming up."""
        figures = self._figures[name]
        n_window = max(1, int(len(figures) * _WINDOW))
        return statistics.median(figures[:n_window]), statistics.median(figures[-n_window:])


def growths(series: Series) -> list[str]:
    """Return a sentence for each figure that has grown."""
    return [str(grown) for grown in series if grown.is_growth]


def _is_kept(fd: Path) -> bool:
    """Tell whether a descriptor is more than a look at /proc, as redis takes ten times a second."""
    try:
        return not os.readlink(fd).startswith("/proc/")
    except FileNotFoundError:
        return False


def read_held(name: str, pid: int) -> dict[str, float]:
    """Return what a process holds; `name` goes before each figure's."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return {
        f"{name}: fds": sum(map(_is_kept, (proc / "fd").iterdir())),
        f"{name}: mappings": (proc / "maps").read_text().count("\n"),
        f"{name}: threads": int(status["Threads"]),
        f"{name}: children": sum(
            len((task / "children").read_text().split()) for task in (proc / "task").iterdir()
        ),
        f"{name}: KiB": int(status["RssAnon"].split()[0]),
    }
