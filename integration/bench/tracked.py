"""What a process pays for being tracked: its first store into each page after a dump."""

import time

from integration.bench import goals
from integration.bench.cycle import dump
from integration.bench.report import Collector, Section
from integration.bench.target import Process, start_target
from integration.bench.tools import Bench

_MIB = 1024
_RATE = 10_000
_WINDOWS = 4
_WINDOW_S = 1.0
_TRIAL_SPINS = 100_000


def measure(bench: Bench) -> list[Section]:
    """Compare one process with itself, before its first dump and while it is dumped."""
    into = Collector(("tracked", "untracked"))
    case = f"{_RATE:,} pages/s, a delta every second"
    for _ in range(bench.rounds(3)):
        with bench.image() as image, start_target(bench.work, mib=_MIB) as process:
            _set_pace(process)
            into.add(case, "throughput", "pages/s", "untracked", _measure_plain(process))
            bench.ckpt.dump(process.pid, image, incremental=True, warm_mib=_MIB)
            rate, gaps = _measure_tracked(bench, process, image)
            into.add(case, "throughput", "pages/s", "tracked", rate)
            for gap_ms in gaps:
                into.add(case, "freeze", "ms", "tracked", gap_ms)
    into.note(f"between two pages it computes, for 1/{_RATE:,} s when nothing else happens")
    return [into.section(f"slow-down by tracking, {_MIB} MiB random", goals.TRACKED)]


def _set_pace(process: Process) -> None:
    """Let it compute for so long between two pages that it writes as many as it shall."""
    spins = _TRIAL_SPINS
    for _ in range(2):
        process.board.write("spins", spins)
        spins = max(int(spins * _pages_per_s(process, _WINDOW_S / 2) / _RATE), 1)
    process.board.write("spins", spins)


def _pages_per_s(process: Process, seconds: float) -> float:
    started, before = time.monotonic(), process.board.read("n_written")
    process.board.pass_time(seconds)
    return (process.board.read("n_written") - before) / (time.monotonic() - started)


def _measure_plain(process: Process) -> float:
    return _pages_per_s(process, _WINDOWS * _WINDOW_S)


def _measure_tracked(bench: Bench, process: Process, image) -> tuple[float, list[float]]:
    """Return the pages per second, from one dump to the last, and the gap of each dump."""
    gaps = []
    started, before = time.monotonic(), process.board.read("n_written")
    for nth in range(_WINDOWS):
        gaps.append(
            dump(process, lambda: bench.ckpt.dump(process.pid, image, incremental=True)).gap_ms
        )
        left_s = started + (nth + 1) * _WINDOW_S - time.monotonic()
        process.board.pass_time(max(left_s, 0))
    rate = (process.board.read("n_written") - before) / (time.monotonic() - started)
    return rate, gaps
