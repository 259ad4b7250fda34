"""Full dumps of much memory, and their way back, on tmpfs and on disk."""

import functools

from integration.bench import goals
from integration.bench.cycle import Case, available_mib, measure, note_lazy
from integration.bench.report import Collector, Section
from integration.bench.target import start_target
from integration.bench.tools import Bench

RATE = 1000
_FILLS = ("random", "half", "sparse")
_SHARE = {"random": 1.0, "half": 1.0, "sparse": 1 / 16}
_ROUNDS = {64: 5, 256: 4, 1024: 3, 4096: 2}


def size_name(mib: int) -> str:
    return f"{mib} MiB" if mib < 1024 else f"{mib // 1024} GiB"


def measure_usual(bench: Bench) -> list[Section]:
    """Measure 64 MiB to 1 GiB."""
    return [_measure(bench, mib, on_disk=False) for mib in (64, 256, 1024)]


def measure_large(bench: Bench) -> list[Section]:
    """Measure 4 GiB."""
    return [_measure(bench, 4096, on_disk=False)]


def measure_disk(bench: Bench) -> list[Section]:
    """Measure 1 GiB with images on a disk."""
    return [_measure(bench, 1024, on_disk=True)]


def _measure(bench: Bench, mib: int, *, on_disk: bool) -> Section:
    into = Collector()
    note_lazy(into)
    if on_disk:
        into.note("ckpt has its image on the disk when it returns (fsync), criu leaves that open")
    for fill in _FILLS:
        n_mib = int(mib * _SHARE[fill])
        # The process, its image, and as much again that is warmed before each command.
        if available_mib() < 3.2 * n_mib:
            into.note(f"{fill}: left out, not enough memory")
            continue
        start = functools.partial(start_target, mib=mib, fill=fill, rate=RATE)
        name = f"{size_name(mib)} {fill}"
        case = Case(name, start, n_mib, _ROUNDS[mib], on_disk=on_disk, may_be_lazy=True)
        measure(bench, case, into)
    where = "disk" if on_disk else "tmpfs"
    title = f"full dump and restore, {size_name(mib)}, {RATE:,} pages written per s, {where}"
    # The goals are for tmpfs: a disk is as fast as it is.
    return into.section(title, {} if on_disk else goals.MEMORY)
