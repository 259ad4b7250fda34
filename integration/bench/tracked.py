"""What a process pays for being tracked: its first store into each page after a dump."""

from collections import defaultdict
from pathlib import Path

from integration.bench import commands
from integration.bench.reference import Heartbeat
from integration.bench.sample import Sample, Section

MIB = 256
ROUNDS = 5
STORES = 2_000_000
_SHARES = {1: "1 % of it", 100: "all of it"}


def measure(directory: Path) -> list[Section]:
    """Return the section of the slow-down."""
    values: dict[str, list[float]] = defaultdict(list)
    image = directory / "tracked"
    with Heartbeat(MIB, cwd=directory) as target:
        for percent in (*_SHARES, *_SHARES):
            target.touch(STORES, percent)  # warms up
        for _ in range(ROUNDS):
            for percent, share in _SHARES.items():
                values[f"never, {share}"].append(_rate(target, percent))
        commands.dump(target.pid, image)
        for _ in range(ROUNDS):
            for percent, share in _SHARES.items():
                commands.dump(target.pid, image)
                values[f"first, {share}"].append(_rate(target, percent))
                values[f"again, {share}"].append(_rate(target, percent))
    return [_section(values)]


def _rate(target: Heartbeat, percent: int) -> float:
    """Return million stores a second."""
    return STORES / target.touch(STORES, percent) / 1000


def _section(values: dict[str, list[float]]) -> Section:
    samples = []
    for share in _SHARES.values():
        never = Sample(f"never tracked, {share}", "M/s", values[f"never, {share}"])
        samples += [
            never,
            Sample("  right after a dump", "M/s", values[f"first, {share}"], against=never),
            Sample("  and again, without a dump", "M/s", values[f"again, {share}"], against=never),
        ]
    title = f"a writer that is tracked: {STORES:,} stores at random into {MIB} MiB"
    return Section(title, samples, "after a dump the first store into each page costs a fault")
