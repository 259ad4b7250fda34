"""Full dumps of much memory, and their way back, on tmpfs and on disk."""

import functools

from integration.bench import goals, reference
from integration.bench.cycle import Case, available_mib, measure, note_lazy
from integration.bench.report import Collector, Section
from integration.bench.target import Process, start_target
from integration.bench.tools import Bench

RATE = 1000
_FILLS = ("random", "half", "sparse")
_EVERY = {"random": 1, "half": 1, "sparse": 16}
_PAGE = 4096
_TRIED = 16384  # pages; what they take is scaled to all
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
    into = Collector(("ckpt", "criu", "limit"))
    note_lazy(into)
    into.note(
        "limit: all pages by process_vm_readv into a warm buffer, or by UFFDIO_COPY; 1 thread"
    )
    if on_disk:
        into.note("ckpt has its image on the disk when it returns (fsync), criu leaves that open")
    for fill in _FILLS:
        n_mib = mib // _EVERY[fill]
        # The process, its image, and as much again that is warmed before each command.
        if available_mib() < 3.2 * n_mib:
            into.note(f"{fill}: left out, not enough memory")
            continue
        start = functools.partial(start_target, mib=mib, fill=fill, rate=RATE)
        name = f"{size_name(mib)} {fill}"
        limits = functools.partial(_measure_limits, every=_EVERY[fill])
        case = Case(name, start, n_mib, _ROUNDS[mib], on_disk, may_be_lazy=True, limits=limits)
        measure(bench, case, into)
    where = "disk" if on_disk else "tmpfs"
    title = f"full dump and restore, {size_name(mib)}, {RATE:,} pages written per s, {where}"
    # The goals are for tmpfs: a disk is as fast as it is.
    return into.section(title, {} if on_disk else goals.MEMORY)


def _measure_limits(process: Process, every: int) -> dict[tuple[str, str], float]:
    """Return the ms that the pages of a process take to be read, and to be put in place."""
    area, n_pages = process.board.read("area"), process.board.read("n_pages") // every
    n = min(n_pages, _TRIED)
    starts = [area + i * every * _PAGE for i in range(n)]
    together = ([area], n * _PAGE) if every == 1 else (starts, _PAGE)
    read_ms = reference.time_readv(process.pid, *together)
    copy_ms = reference.time_uffd_copy(n * _PAGE) * 1e3
    return {("wall", "ms"): read_ms * n_pages / n, ("restore", "ms"): copy_ms * n_pages / n}
