"""What was measured, by whom and how often; ratios, goals, and the tables that show them."""

import enum
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import attrs
from rich.console import Console
from rich.table import Table


class Of(enum.Enum):
    """What a goal is about."""

    FIGURE = "figure"
    RATIO = "ratio"


@attrs.frozen
class Goal:
    """What was promised of a median: of the first column's, or of the ratio to the second's."""

    limit: float
    of: Of = Of.FIGURE
    at_least: bool = False

    def is_met(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit

    def text(self, unit: str) -> str:
        sign = "≥" if self.at_least else "≤"
        if self.of is Of.FIGURE:
            return f"{sign} {self.limit:g} {unit}".rstrip()
        # A small ratio is easier to read as a part: 1/40.
        return f"{sign} {self.limit:g} x" if self.limit > 0.1 else f"{sign} 1/{1 / self.limit:g} x"


@attrs.frozen
class Row:
    """One thing that was measured, in the same rounds for each column."""

    case: str
    measure: str
    unit: str
    by: Mapping[str, Sequence[float]]
    """Column -> values in the order of the rounds."""
    columns: tuple[str, ...]
    goals: tuple[Goal, ...] = ()

    def ratios(self) -> list[float]:
        """Return first by second column, round by round; empty if one of them has no values."""
        first, second = (self.by.get(name, ()) for name in (*self.columns, "")[:2])
        return [a / b for a, b in zip(first, second, strict=False) if b]

    def figure(self, goal: Goal) -> float | None:
        """Return what a goal is held against; None where there is nothing."""
        values = self.ratios() if goal.of is Of.RATIO else self.by.get(self.columns[0], ())
        return statistics.median(values) if values else None

    def verdict(self, goal: Goal) -> str:
        """Tell whether a goal was met; empty where there is nothing to judge."""
        if (figure := self.figure(goal)) is None:
            return ""
        return "met" if goal.is_met(figure) else "missed"

    def plain(self) -> dict[str, object]:
        """Return it as JSON takes it."""
        plain: dict[str, object] = {
            "case": self.case,
            "measure": self.measure,
            "unit": self.unit,
            "by": {name: summary(values) for name, values in self.by.items()},
        }
        if ratios := self.ratios():
            plain["ratio"] = summary(ratios)
        if self.goals:
            plain["goals"] = {goal.text(self.unit): self.verdict(goal) for goal in self.goals}
        return plain


@attrs.frozen
class Section:
    """One table."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def plain(self) -> dict[str, object]:
        """Return it as JSON takes it."""
        rows = [row.plain() for row in self.rows]
        return {"title": self.title, "columns": self.columns, "rows": rows, "notes": self.notes}


GoalsOf = Mapping[tuple[str, str], tuple[Goal, ...]]
"""(case, measure) -> goals."""


class Collector:
    """Gathers values, in the order in which cases and measures first appear."""

    def __init__(self, columns: tuple[str, ...] = ("ckpt", "criu")) -> None:
        self.columns = columns
        self.notes: list[str] = []
        self._values: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(dict)

    def add(self, case: str, measure: str, unit: str, column: str, value: float) -> None:
        self._values[case, measure, unit].setdefault(column, []).append(value)

    def note(self, text: str) -> None:
        """Say something below the table, once."""
        if text not in self.notes:
            self.notes.append(text)

    def values(self, case: str, measure: str, column: str) -> list[float]:
        """Return what was added so far."""
        for (of_case, of_measure, _), by in self._values.items():
            if (of_case, of_measure) == (case, measure):
                return by.get(column, [])
        return []

    def section(self, title: str, goals: GoalsOf) -> Section:
        rows = [
            Row(case, measure, unit, by, self.columns, goals.get((case, measure), ()))
            for (case, measure, unit), by in self._values.items()
        ]
        return Section(title, self.columns, rows, self.notes)


def summary(values: Sequence[float]) -> dict[str, object]:
    """Return min, median and max beside the values."""
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "values": [round(value, 4) for value in values],
    }


def show(console: Console, section: Section) -> None:
    """Print one table: median (min - max) in each cell."""
    table = Table(title=section.title, title_justify="left", caption_justify="left")
    table.add_column("")
    table.add_column("")
    for name in section.columns:
        table.add_column(name, justify="right")
    two = len(section.columns) > 1
    if two:
        table.add_column("ratio", justify="right")
    table.add_column("n", justify="right")
    table.add_column("goal")
    case = None
    for row in section.rows:
        if row.case != case:
            table.add_section()
        cells = [_cell(row.by.get(name, ())) for name in section.columns]
        if two:
            cells.append(_cell(row.ratios()))
        counts = str(max(len(values) for values in row.by.values()))
        shown = row.case if row.case != case else ""
        measure = f"{row.measure}, {row.unit}" if row.unit else row.measure
        table.add_row(shown, measure, *cells, counts, _goals(row))
        case = row.case
    if section.notes:
        table.caption = "\n".join(section.notes)
    console.print(table)


def show_goals(console: Console, sections: Sequence[Section]) -> None:
    """Print every goal that was judged, beside its figure."""
    judged = [
        (row, goal, figure)
        for section in sections
        for row in section.rows
        for goal in row.goals
        if (figure := row.figure(goal)) is not None
    ]
    if not judged:
        return
    n_met = sum(row.verdict(goal) == "met" for row, goal, _ in judged)
    title = f"goals: {n_met} of {len(judged)} met"
    table = Table("", "", title=title, title_justify="left", box=None, show_header=False)
    for row, goal, figure in judged:
        unit = row.unit if goal.of is Of.FIGURE else "x"
        figures = f"{_number(figure)} {unit}", goal.text(row.unit), row.verdict(goal)
        table.add_row(row.case, row.measure, *figures)
    console.print(table)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle = _number(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({_number(min(values))} - {_number(max(values))})"


def _number(value: float) -> str:
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def _goals(row: Row) -> str:
    parts = [f"{goal.text(row.unit)}: {row.verdict(goal) or 'no figure'}" for goal in row.goals]
    return ", ".join(parts)
