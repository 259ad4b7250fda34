"""`make bench-plots`: cost by number of pages, threads, VMAs and open files, measured and drawn.

    python -m integration.bench.plots [--draw-only] [--rounds N] [AXIS ...]

The numbers go into results/scaling.json, axis by axis, and every axis in it becomes
results/scaling-AXIS.svg. matplotlib is imported when something is drawn.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from integration.bench.__main__ import describe_machine, prepare
from integration.bench.scaling import AXES, MEASURES, measure_axis

RESULTS = Path(__file__).parent / "results"
_NUMBERS = RESULTS / "scaling.json"
_COLOURS = {"ckpt": "#1f6feb", "criu": "#8b949e"}


def draw(name: str, axis: dict[str, Any], compared: str, into: Path) -> None:
    """Write one figure: a panel for each measure, with points, their ranges, and the line."""
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "ckpt", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(MEASURES), figsize=(11, 3.4), layout="constrained")
    for panel, measure in zip(panels, MEASURES, strict=True):
        for tool, found in axis["measures"].get(measure, {}).items():
            _draw_tool(panel, tool, axis["unit"], found)
        panel.set(title=f"{measure}, ms", xlabel=axis["label"], xlim=(0, None), ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    figure.suptitle(f"cost by {axis['label']}: ckpt {compared}")
    figure.savefig(into / f"scaling-{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def _draw_tool(panel: Any, tool: str, unit: str, found: dict[str, Any]) -> None:
    points, line = found["points"], found["line"]
    sizes = [point["n"] for point in points]
    medians = [point["median"] for point in points]
    below = [point["median"] - point["min"] for point in points]
    above = [point["max"] - point["median"] for point in points]
    each_us = line["ms_each"] * 1e3
    label = f"{tool}: {each_us:,.3g} µs per {unit}, R² {line['r2']:.3f}"
    colour = _COLOURS[tool]
    panel.errorbar(
        sizes, medians, yerr=[below, above], fmt="o", ms=4, capsize=2, color=colour, label=label
    )
    ends = (0, sizes[-1])
    panel.plot(ends, [line["ms_at_0"] + line["ms_each"] * n for n in ends], color=colour, lw=1)


def _measure(names: list[str], rounds: int | None, numbers: dict[str, Any]) -> None:
    """Measure the axes one by one into `numbers`, and keep what is there after each."""
    load_before, started_s = os.getloadavg()[0], time.monotonic()
    with prepare([], rounds) as (bench, line):
        print(line)
        numbers["compared"] = line
        for name in names:
            found = measure_axis(bench, AXES[name])
            found["machine"] = describe_machine(load_before, time.monotonic() - started_s)
            numbers["axes"][name] = found
            _NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
            _say(name, found)


def _say(name: str, axis: dict[str, Any]) -> None:
    for measure, tools in axis["measures"].items():
        for tool, found in tools.items():
            line = found["line"]
            print(
                f"{name}: {measure} by {tool}: {line['ms_at_0']:.1f} ms"
                f" + {line['ms_each'] * 1e3:,.3g} µs per {axis['unit']}, R² {line['r2']:.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="integration.bench.plots")
    parser.add_argument("--rounds", type=int, help="measure so often instead of 3 times")
    parser.add_argument("--draw-only", action="store_true", help="draw the numbers that are there")
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=", ".join(AXES))
    args = parser.parse_args()
    if unknown := set(args.axes) - set(AXES):
        parser.error(f"no axis {', '.join(sorted(unknown))}; there are {', '.join(AXES)}")
    RESULTS.mkdir(exist_ok=True)
    numbers: dict[str, Any] = {"compared": "", "axes": {}}
    if _NUMBERS.exists():
        numbers = json.loads(_NUMBERS.read_text())
    if not args.draw_only:
        _measure(args.axes or list(AXES), args.rounds, numbers)
    for name, axis in numbers["axes"].items():
        draw(name, axis, numbers["compared"], RESULTS)
    print(f"{len(numbers['axes'])} figures in {RESULTS}")


if __name__ == "__main__":
    main()
