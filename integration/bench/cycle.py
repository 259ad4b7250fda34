"""One life of a process under a tool: started, dumped while it runs, killed, brought back.

Each tool gets a process of its own in every round: what one leaves behind (a tracked address
space, a page cache full of its images) shall not be charged to the other.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from integration.bench.report import Collector
from integration.bench.target import Gone, Process
from integration.bench.tools import (
    Bench,
    Ckpt,
    Dumped,
    Run,
    Tool,
    ToolFailed,
    bytes_on_disk,
    ckpt_offers,
    run,
    said_by_ckpt,
)

_SETTLE_S = 0.3
_IDLE_S = 0.2
_IDLE = ("idle", "ms")
_NOT_THERE = "ckpt restore --lazy is not there"
_NET = "restore --lazy, net: less what python alone takes to start and to end"


@attrs.frozen
class Case:
    """What is measured, and how."""

    name: str
    start: Callable[[Path], Process]
    mib: int = 1
    """Memory of the process, and at most of its image: so much is warmed before a command."""
    rounds: int = 3
    on_disk: bool = False
    restores: bool = True
    may_be_lazy: bool = False
    limits: Callable[[Process], Mapping[tuple[str, str], float]] | None = None
    """Asked while the process still stands as it was dumped: (measure, unit) -> the least that it
    takes, for the column "limit"."""


def measure(bench: Bench, case: Case, into: Collector) -> None:
    """Take a case through its rounds, the tools in turn; one that fails is named and left out."""
    tools = list(bench.tools)
    beside: dict[tuple[str, str], list[float]] = defaultdict(list)
    for nth in range(bench.rounds(case.rounds)):
        for tool in bench.in_turn(nth):
            if tool not in tools:
                continue
            try:
                found = _measure_once(bench, case, tool, beside)
            except (ToolFailed, Gone, TimeoutError, RuntimeError) as exc:
                tools.remove(tool)
                into.note(f"{case.name}: {tool.name} failed: {_last_line(str(exc))}")
                print(f"{case.name}: {tool.name}: {exc}", file=sys.stderr)
                continue
            for (name, unit), value in found.items():
                into.add(case.name, name, unit, tool.name, value)
    idle_ms = beside.pop(_IDLE, [])
    for (name, unit), values in beside.items():
        for value in values:
            into.add(case.name, name, unit, "limit", value)
    if idle_ms:
        middle, most = statistics.median(idle_ms), max(idle_ms)
        into.note(
            f"{case.name}: longest gap in {_IDLE_S:g} s without any dump: {middle:.2f} ms, at most"
            f" {most:.2f}"
        )


def _last_line(text: str) -> str:
    """Return the last line that is not the JSON of `ckpt --json`."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("{")]
    return lines[-1].strip()[:160] if lines else "no word"


_Found = dict[tuple[str, str], float]


def _measure_once(
    bench: Bench, case: Case, tool: Tool, beside: dict[tuple[str, str], list[float]]
) -> _Found:
    with bench.image(on_disk=case.on_disk) as image, case.start(bench.work) as process:
        process.board.pass_time(_SETTLE_S)
        process.board.reset()
        process.board.pass_time(_IDLE_S)
        beside[_IDLE].append(process.board.gap_ms())
        dumped = dump(process, lambda: tool.dump(process.pid, image, warm_mib=case.mib))
        found = _of_dump(dumped, image)
        if isinstance(tool, Ckpt):
            found["freeze, as it says", "ms"] = float(said_by_ckpt(dumped.done)["freeze_ms"])
        if case.limits and isinstance(tool, Ckpt):
            for name, value in case.limits(process).items():
                beside[name].append(value)
        if not case.restores:
            return found
        process.end()
        found |= _of_restore(process, tool.restore(image, warm_mib=case.mib))
        if case.may_be_lazy and isinstance(tool, Ckpt) and ckpt_offers("restore", "--lazy"):
            process.end()
            found |= _of_lazy_restore(process, tool.restore(image, warm_mib=case.mib, lazy=True))
        return found


def dump(process: Process, take: Callable[[], Run]) -> Dumped:
    """Call `take`, which dumps the process, and read the longest gap from before to after."""
    process.board.reset()
    done = take()
    return Dumped(process.board.gap_ms(), done)


def _of_dump(dumped: Dumped, image: Path) -> _Found:
    return {
        ("freeze", "ms"): dumped.gap_ms,
        ("wall", "ms"): dumped.done.wall_ms,
        ("processor time", "ms"): dumped.done.cpu_ms,
        ("image", "MB"): bytes_on_disk(image) / 1e6,
        ("dump's memory", "MiB"): dumped.done.peak_mib,
    }


def _of_restore(process: Process, done: Run) -> _Found:
    return {
        ("restore", "ms"): _first_beat_ms(process, done),
        ("restore's memory", "MiB"): done.peak_mib,
    }


def _of_lazy_restore(process: Process, done: Run) -> _Found:
    first_ms = _first_beat_ms(process, done)
    return {
        ("restore --lazy", "ms"): first_ms,
        ("restore --lazy, net", "ms"): first_ms - time_python(),
    }


def _first_beat_ms(process: Process, done: Run) -> float:
    """Return the ms from the start of the restore to the first heartbeat; all memory is checked."""
    process.board.wait_beats(2)
    first_ns = process.board.gap_end_ns()
    process.board.check()
    return (first_ns - done.started_ns) / 1e6


def time_python(code: str = "pass") -> float:
    """Return the ms that a Python that does next to nothing takes."""
    return run([sys.executable, "-c", code]).wall_ms


def warm_up(bench: Bench, start: Callable[[Path], Process]) -> None:
    """Let every tool do everything once: files are read, modules compiled, the kernel probed."""
    case = Case("warm-up", start, mib=1, rounds=1)
    measure(attrs.evolve(bench, n_rounds=1), case, Collector())


def note_lazy(into: Collector) -> None:
    """Say what the figures of a lazy restore are, or that there is none."""
    into.note(_NET if ckpt_offers("restore", "--lazy") else _NOT_THERE)


def available_mib() -> int:
    """Return how much memory could be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 0
