"""How fast this machine is at what a dump and a restore are made of, with nothing around it."""

import functools
import os
from collections.abc import Callable

from integration.bench import reference
from integration.bench.report import Collector, Section
from integration.bench.target import start_target
from integration.bench.tools import Bench

_MIB = 256
_BYTES = _MIB << 20
_SMALLER = 64 << 20
_LEVELS = (1, -1, -5)


def measure(bench: Bench) -> list[Section]:
    """Measure each in turn."""
    into = Collector(("GB/s",))
    for nth in range(bench.rounds(5) + 1):
        for name, rate in _measure_round(bench).items():
            if nth:  # the first warms up
                into.add(*name, "", "GB/s", rate)
    into.note("zstd: one thread, frames of 1 MiB; half: a random and a zero word in turn")
    return [into.section("limits of this machine, one thread, warm memory", {})]


def _measure_round(bench: Bench) -> dict[tuple[str, str], float]:
    with start_target(bench.work, mib=_MIB) as process:
        area = process.board.read("area")
        read_s, write_s = reference.time_vm_stream(process.pid, area, _BYTES)
    took: dict[tuple[str, str], tuple[int, float]] = {
        ("memcpy", ""): (_SMALLER, reference.time_memcpy(_SMALLER)),
        ("process_vm_readv", "into a warm buffer"): (_BYTES, read_s),
        ("process_vm_writev", "into warm pages"): (_BYTES, write_s),
        ("first touch", "of memory freed just before"): (
            _SMALLER,
            reference.time_fresh_memory(_SMALLER),
        ),
        ("UFFDIO_COPY", "4 KiB pages, 4 MiB a call"): (
            _SMALLER,
            reference.time_uffd_copy(_SMALLER),
        ),
    }
    writes: dict[str, Callable[[], float]] = {
        "a new file on tmpfs": functools.partial(
            reference.time_write, bench.tmpfs / "written", _BYTES, sync=False
        ),
        "a new file on disk, fsync": functools.partial(
            reference.time_write, bench.disk / "written", _BYTES, sync=True
        ),
    }
    took |= {("write", name): (_BYTES, write()) for name, write in writes.items()}
    for kind, data in {"random": os.urandom(_SMALLER), "half": _half_random(_SMALLER)}.items():
        for level in _LEVELS:
            took_s, share = reference.time_zstd(data, level)
            took["zstd", f"level {level}, {kind}: to {share:.0%}"] = (_SMALLER, took_s)
    return {name: n_bytes / took_s / 1e9 for name, (n_bytes, took_s) in took.items()}


def _half_random(n_bytes: int) -> bytes:
    data = bytearray(os.urandom(n_bytes))
    for at in range(8, 16):
        data[at::16] = bytes(n_bytes // 16)
    return bytes(data)
