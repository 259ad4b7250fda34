"""How long an incremental dump stops a process that wrote 1 % of its memory, and its start-up."""

import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from integration.bench import commands
from integration.bench.reference import Heartbeat, time_memcpy, time_readv, time_stop
from integration.bench.sample import Goal, Sample, Section

MIB = 256
ROUNDS = 12
_PATTERNS = {"write": "scattered", "cluster": "clustered"}
_NOW = "import time; print(time.monotonic_ns())"
_LIBRARIES = "import click, attrs, ptrace.binding; " + _NOW


def time_python(code: str) -> float:
    """Return the ms from before the fork until Python has run `code`, which prints the clock."""
    command = [sys.executable, "-c", code]
    started_ns = time.monotonic_ns()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, env=commands.environment(), text=True
    )
    return (int(done.stdout) - started_ns) / 1e6


def measure(directory: Path) -> list[Section]:
    """Return the sections about the freeze and about the way to it, from the same dumps."""
    values: dict[str, list[float]] = defaultdict(list)
    with Heartbeat(MIB, cwd=directory) as target:
        image = directory / "delta"
        commands.dump(target.pid, image)
        for number in range(ROUNDS + 1):
            for step in _PATTERNS:
                found = _measure_dump(target, image, step)
                found |= _measure_others(target)
                if number:  # the first round only warms up
                    for name, value in found.items():
                        values[name].append(value)
    return [_freeze_section(values), _start_section(values)]


def _measure_dump(target: Heartbeat, image: Path, step: str) -> dict[str, float]:
    """Write, dump, ask the target; the references are for the very same pages."""
    pattern = _PATTERNS[step]
    starts, len_bytes = target.step(step)
    target.gap()
    run = commands.dump(target.pid, image)
    gap_ms, gap_start_ns = target.gap()
    found = {
        f"gap, {pattern}": gap_ms,
        f"freeze_ms, {pattern}": run.said["freeze_ms"],
        f"wall, {pattern}": run.wall_ms,
        f"pages, {pattern}": run.said["pages"]["data"],
        f"readv, {pattern}": time_readv(target.pid, starts, len_bytes),
    }
    # On a busy machine the longest gap may be the scheduler's, which says nothing of our start.
    if gap_start_ns > run.started_ns and gap_ms > 0.8 * run.said["freeze_ms"]:
        found["start"] = (gap_start_ns - run.started_ns) / 1e6
    return found


def _measure_others(target: Heartbeat) -> dict[str, float]:
    """Measure what every dump is held against, in the same minute."""
    stop_ms = time_stop(target.pid)
    target.gap()
    found = {"python": time_python(_NOW), "libraries": time_python(_LIBRARIES)}
    return found | {
        "gap, no dump": target.gap()[0],
        "memcpy": time_memcpy(target.n_pages // 100 * 4096),
        "stop": stop_ms,
    }


def _freeze_section(values: dict[str, list[float]]) -> Section:
    samples = []
    memcpy = Sample("memcpy, as many bytes", "ms", values["memcpy"])
    for pattern in _PATTERNS.values():
        readv = Sample(
            f"process_vm_readv, same pages, {pattern}",
            "ms",
            values[f"readv, {pattern}"],
            against=memcpy,
        )
        gap = Sample(
            f"gap felt inside, {pattern}",
            "ms",
            values[f"gap, {pattern}"],
            against=readv,
            goal=Goal("under 10 ms", 10.0),
        )
        own = Sample(
            f"freeze_ms, {pattern}",
            "ms",
            values[f"freeze_ms, {pattern}"],
            against=gap,
        )
        wall = Sample(f"whole command, {pattern}", "ms", values[f"wall, {pattern}"])
        pages = Sample(f"pages stored, {pattern}", "", values[f"pages, {pattern}"])
        samples += [gap, own, readv, wall, pages]
    samples += [
        memcpy,
        Sample("seize, interrupt, wait, detach alone", "ms", values["stop"]),
        Sample("gap felt inside while other commands ran", "ms", values["gap, no dump"]),
    ]
    title = f"freeze of an incremental dump: {MIB} MiB, 1 % written"
    return Section(
        title, samples, "gap: the longest, an upper bound, for what the scheduler takes counts too"
    )


def _start_section(values: dict[str, list[float]]) -> Section:
    python = Sample("python -c pass", "ms", values["python"])
    libraries = Sample(
        "python -c 'import click, attrs, ptrace'", "ms", values["libraries"], against=python
    )
    start = Sample(
        "ckpt dump, until the target stands",
        "ms",
        values["start"],
        against=libraries,
        goal=Goal("under 150 ms", 150.0),
    )
    note = (
        "from before the fork; the target itself says when it stood still, right after the first"
        " ptrace call"
    )
    return Section("start of ckpt dump", [start, libraries, python], note)
