"""Repeated measurements of one thing, and what they are held against."""

import statistics
from collections.abc import Sequence

import attrs


@attrs.frozen
class Goal:
    """What was promised; the median decides."""

    text: str
    below: float


@attrs.frozen
class Sample:
    """One line of the report."""

    name: str
    unit: str
    values: Sequence[float] = attrs.field(converter=tuple)
    against: "Sample | None" = None
    """Measured in the same run; the ratio of the medians is shown."""
    goal: Goal | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        if self.against is None or not self.against.median:
            return None
        return self.median / self.against.median

    @property
    def verdict(self) -> str:
        """Tell whether the goal was met: by the median, only by the quickest run, or not at all."""
        if self.goal is None:
            return ""
        if self.median < self.goal.below:
            return "met"
        return "met by the quickest only" if min(self.values) < self.goal.below else "missed"

    def plain(self) -> dict[str, object]:
        """Return it as JSON takes it."""
        plain: dict[str, object] = {
            "name": self.name,
            "unit": self.unit,
            "n": len(self.values),
            "min": min(self.values),
            "median": self.median,
            "max": max(self.values),
        }
        if self.against is not None:
            plain |= {"against": self.against.name, "ratio": self.ratio}
        if self.goal is not None:
            plain |= {"goal": self.goal.text, "verdict": self.verdict}
        return plain


@attrs.frozen
class Section:
    """One table of the report."""

    title: str
    samples: Sequence[Sample]
    note: str = ""
