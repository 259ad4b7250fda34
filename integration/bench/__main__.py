"""`make bench`: ckpt and CRIU side by side in one run, as tables or with `--json`.

    python -m integration.bench [--json] [--rounds N] [--option WORD]... [SECTION ...]

Compare ratios between machines, not milliseconds. README.md says what each section measures.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.console import Console

from integration.bench import delta, limits, memory, objects, softdirty, tracked
from integration.bench.cycle import warm_up
from integration.bench.report import Section, show, show_goals
from integration.bench.target import start_target
from integration.bench.tools import Bench, find_tools, reap_orphans

SECTIONS: Mapping[str, Callable[[Bench], list[Section]]] = {
    "limits": limits.measure,
    "small": objects.measure_small,
    "memory": memory.measure_usual,
    "objects": objects.measure_objects,
    "redis": objects.measure_redis,
    "delta": delta.measure_usual,
    "tracked": tracked.measure,
    "busy": objects.measure_busy,
    "disk": memory.measure_disk,
    "memory-4g": memory.measure_large,
    "delta-4g": delta.measure_large,
    "soft-dirty": softdirty.measure,
}
_TMPFS = "/dev/shm"
_QUIET = 0.5
"""Load average up to which figures may be held against the goals."""


@contextlib.contextmanager
def prepare(options: list[str], n_rounds: int | None) -> Iterator[tuple[Bench, str]]:
    """Yield the bench, warmed up, and a line on who is compared."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leave nothing behind
    tools, line = find_tools(options)
    with (
        tempfile.TemporaryDirectory(prefix="ckpt-bench-") as disk,
        tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=_TMPFS) as tmpfs,
    ):
        work = Path(disk, "work")
        work.mkdir()
        bench = Bench(tools, work, Path(tmpfs), Path(disk), n_rounds)
        warm_up(bench, lambda cwd: start_target(cwd, mib=1))
        try:
            yield bench, line
        finally:
            reap_orphans()


def describe_machine(load_before: float, took_s: float) -> dict[str, object]:
    """Return what the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "kernel": os.uname().release,
        "load_before": round(load_before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "took_s": round(took_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="integration.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, help="measure so often instead of 2 to 10 times")
    parser.add_argument(
        "--option", action="append", default=[], help="give it to every ckpt dump", metavar="WORD"
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    console = Console(width=160, file=sys.stderr if args.json else sys.stdout)
    started_s, load_before = time.monotonic(), os.getloadavg()[0]
    found: list[Section] = []
    with prepare(args.option, args.rounds) as (bench, line):
        console.print(line)
        for name in args.sections or SECTIONS:
            for section in SECTIONS[name](bench):
                found.append(section)
                show(console, section)
    show_goals(console, found)
    machine = describe_machine(load_before, time.monotonic() - started_s)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if load_before > _QUIET:
        console.print("the machine was not quiet: take no figure of this run for a goal's")
    if args.json:
        sections = [section.plain() for section in found]
        print(json.dumps({"machine": machine, "compared": line, "sections": sections}))


if __name__ == "__main__":
    main()
