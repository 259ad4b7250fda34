"""`make bench`: every figure in one run, as a table or with `--json`.

    python -m integration.bench [--json] [SECTION ...]

Sections: freeze (and the start), volume, tracked. Each figure stands beside a reference of the same
run: compare ratios between machines, not milliseconds.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from integration.bench import freeze, tracked, volume
from integration.bench.sample import Sample, Section

SECTIONS = {"freeze": freeze, "volume": volume, "tracked": tracked}


def show(console: Console, section: Section) -> None:
    table = Table(title=section.title, caption=section.note or None, title_justify="left")
    table.add_column("")
    for name in ("min", "median", "max", "n"):
        table.add_column(name, justify="right")
    table.add_column("unit")
    table.add_column("ratio, to what")
    table.add_column("goal")
    for sample in section.samples:
        table.add_row(sample.name, *_numbers(sample), sample.unit, _ratio(sample), _goal(sample))
    console.print(table)


def _numbers(sample: Sample) -> list[str]:
    low, high = min(sample.values), max(sample.values)
    return [*(f"{value:,.2f}" for value in (low, sample.median, high)), str(len(sample.values))]


def _ratio(sample: Sample) -> str:
    if sample.against is None or sample.ratio is None:
        return ""
    return f"{sample.ratio:.2f}  {sample.against.name.strip()}"


def _goal(sample: Sample) -> str:
    return f"{sample.goal.text}: {sample.verdict}" if sample.goal else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="integration.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}")
    console = Console(width=150, file=sys.stderr if args.json else sys.stdout)
    started_s, load_before = time.monotonic(), os.getloadavg()
    found: list[Section] = []
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as directory:
        for name in args.sections or SECTIONS:
            for section in SECTIONS[name].measure(Path(directory)):
                found.append(section)
                show(console, section)
    machine = {
        "cpus": os.cpu_count(),
        "kernel": os.uname().release,
        "load_before": load_before,
        "load_after": os.getloadavg(),
        "took_s": round(time.monotonic() - started_s, 1),
    }
    console.print(
        f"{machine['cpus']} processors, Linux {machine['kernel']}, load {load_before[0]:.1f} before"
        f" and {os.getloadavg()[0]:.1f} after, {machine['took_s']} s"
    )
    if args.json:
        sections = [
            {"title": section.title, "samples": [sample.plain() for sample in section.samples]}
            for section in found
        ]
        print(json.dumps({"machine": machine, "sections": sections}))


if __name__ == "__main__":
    main()
