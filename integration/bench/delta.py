"""Incremental dumps: a share of the memory was written since the one before.

CRIU has none on kernels without soft-dirty, so the second column is what the kernel asks at least:
process_vm_readv of as many pages, spread in the same way, into warm memory.
"""

from integration.bench import goals
from integration.bench.cycle import available_mib, dump
from integration.bench.memory import size_name
from integration.bench.reference import time_readv
from integration.bench.report import Collector, Section
from integration.bench.target import Process, start_target
from integration.bench.tools import Bench, said_by_ckpt

_PAGE = 4096
_USUAL = (0.1, 1.0, 10.0)


def measure_usual(bench: Bench) -> list[Section]:
    """Measure 1 GiB."""
    return [_measure(bench, 1024, _USUAL, 4)]


def measure_large(bench: Bench) -> list[Section]:
    """Measure 4 GiB."""
    return [_measure(bench, 4096, (1.0,), 3)]


def _measure(bench: Bench, mib: int, shares: tuple[float, ...], rounds: int) -> Section:
    into = Collector(("ckpt", "readv"))
    title = f"incremental dump, {size_name(mib)} random, tmpfs"
    if available_mib() < 2.6 * mib:
        into.note("left out, not enough memory")
        return into.section(title, goals.DELTA)
    with bench.image() as image, start_target(bench.work, mib=mib, fill="random") as process:
        bench.ckpt.dump(process.pid, image, incremental=True, warm_mib=mib)
        for nth in range(bench.rounds(rounds) + 1):
            for share in shares:
                for clustered in (False, True):
                    name = f"{size_name(mib)}, {share:g} % " + (
                        "clustered" if clustered else "scattered"
                    )
                    found = _measure_once(bench, process, image, share, clustered=clustered)
                    for (measure, unit, column), value in found.items() if nth else ():
                        into.add(name, measure, unit, column, value)
        process.board.check()
    into.note("readv: process_vm_readv of as many pages into warm memory, the least that must be")
    into.note("the first round, which is not counted, warms up")
    return into.section(title, goals.DELTA)


def _measure_once(bench: Bench, process: Process, image, share: float, *, clustered: bool):
    n_pages = process.board.read("n_pages")
    n = int(n_pages * share / 100)
    process.board.write_pages(n, clustered=clustered)
    warm_mib = n * _PAGE // (1 << 20) + 16
    dumped = dump(
        process,
        lambda: bench.ckpt.dump(process.pid, image, incremental=True, warm_mib=warm_mib),
    )
    said = said_by_ckpt(dumped.done)
    start = process.board.read("area")
    if clustered:
        starts, len_bytes = [start], n * _PAGE
    else:
        starts, len_bytes = [start + i * n_pages // n * _PAGE for i in range(n)], _PAGE
    return {
        ("freeze", "ms", "ckpt"): dumped.gap_ms,
        ("freeze", "ms", "readv"): time_readv(process.pid, starts, len_bytes),
        ("freeze, as it says", "ms", "ckpt"): float(said["freeze_ms"]),
        ("wall", "ms", "ckpt"): dumped.done.wall_ms,
        ("stored", "MB", "ckpt"): said["bytes"] / 1e6,
        ("pages stored / written", "", "ckpt"): said["pages"]["data"] / n,
        ("dump's memory", "MiB", "ckpt"): dumped.done.peak_mib,
    }
