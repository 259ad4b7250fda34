"""Incremental dumps beside CRIU's, in the one place where CRIU has them: a soft-dirty kernel.

Debian's 6.1 is booted in qemu, without KVM. Milliseconds mean nothing there; ratios do, roughly.

    python -m integration.bench.softdirty REPORT     (inside: measures, and writes JSON)
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import attrs

from integration.bench.build import build
from integration.bench.criu import default_cache, find_criu
from integration.bench.cycle import dump
from integration.bench.report import Collector, Section
from integration.bench.target import start_target
from integration.bench.tools import (
    Bench,
    Ckpt,
    Criu,
    Run,
    bytes_on_disk,
    find_tools,
    said_by_ckpt,
)
from integration.kernels.apt import AptError
from integration.kernels.images import REPOSITORY, WISHES, KernelCache, ensure_host_tools
from integration.kernels.images import default_cache as kernel_cache
from integration.kernels.vm import Machine, VmError

_MIB = 64
_SHARES = (1.0, 10.0)
_ROUNDS = 3
_TIMEOUT_S = 600.0
_COLUMN = "ckpt / criu"
_MEASURES = ("freeze", "wall", "image")


def measure(bench: Bench) -> list[Section]:
    """Boot, measure inside, and compare; where there is no such kernel, say so."""
    into = Collector((_COLUMN,))
    try:
        found = _run_inside(bench)
    except (AptError, VmError) as exc:
        into.note(f"left out: {str(exc).splitlines()[0]}")
    else:
        for case, by in found.items():
            for name in _MEASURES:
                pairs = zip(by["ckpt"][name], by["criu"][name], strict=True)
                for ours, theirs in pairs:
                    into.add(case, name, "", _COLUMN, ours / theirs)
    into.note("wall has the start of Python in it, which emulation makes long")
    title = f"incremental dump beside criu --track-mem, {_MIB} MiB random, soft-dirty, emulated"
    return [into.section(title, {})]


def _run_inside(bench: Bench) -> dict[str, dict[str, dict[str, list[float]]]]:
    ensure_host_tools()
    find_criu(default_cache())
    for name in ("target", "launch"):
        build(name)
    cache = KernelCache(kernel_cache())
    (wish,) = (wish for wish in WISHES if "pagemap_scan" not in wish.offers)
    machine = Machine(cache.prepare(wish), cache.prepare_busybox())
    with tempfile.TemporaryDirectory(dir=bench.disk) as shared:
        report = Path(shared, "report.json")
        outcome = machine.run(
            [sys.executable, "-m", "integration.bench.softdirty", str(report)],
            cwd=REPOSITORY,
            env={"XDG_CACHE_HOME": str(default_cache().parent)},
            results=Path(shared),
            timeout_s=_TIMEOUT_S,
        )
        if outcome.exit_code:
            raise VmError(f"the bench inside failed: {outcome.output[-2000:]}")
        found = json.loads(report.read_text())
        assert isinstance(found, dict)
        return found


@attrs.frozen
class Chain:
    """How a tool adds to what it has: `add(pid, nth, image)` returns the run and its bytes."""

    name: str
    add: Callable[[int, int, Path], tuple[Run, int]]


def _add_by_ckpt(pid: int, nth: int, image: Path) -> tuple[Run, int]:
    done = Ckpt().dump(pid, image, incremental=True)
    said = said_by_ckpt(done)
    if said["kind"] != ("delta" if nth else "full"):
        raise RuntimeError(f"no delta: {said['reason']}")
    return done, int(said["bytes"])


def _chain_of_criu(criu: Criu) -> Chain:
    def add(pid: int, nth: int, image: Path) -> tuple[Run, int]:
        own = image / str(nth)
        more = ["--prev-images-dir", f"../{nth - 1}"] if nth else []
        return criu.dump(pid, own, more=("--track-mem", *more)), bytes_on_disk(own)

    return Chain("criu", add)


def _measure_chain(chain: Chain, directory: Path) -> dict[str, dict[str, list[float]]]:
    """Take a process through all cases with one tool: case -> measure -> values."""
    found: dict[str, dict[str, list[float]]] = {}
    image = directory / chain.name
    with start_target(directory, mib=_MIB, fill="random") as process:
        chain.add(process.pid, 0, image)
        nth = 0
        for _ in range(_ROUNDS):
            for share in _SHARES:
                for clustered in (False, True):
                    nth += 1
                    process.board.write_pages(int(_MIB * 256 * share / 100), clustered=clustered)
                    taken: list[int] = []

                    def take(nth: int = nth, taken: list[int] = taken) -> Run:
                        done, n_bytes = chain.add(process.pid, nth, image)
                        taken.append(n_bytes)
                        return done

                    dumped = dump(process, take)
                    case = f"{share:g} % {'clustered' if clustered else 'scattered'}"
                    values = found.setdefault(case, {name: [] for name in _MEASURES})
                    values["freeze"].append(dumped.gap_ms)
                    values["wall"].append(dumped.done.wall_ms)
                    values["image"].append(taken[0] / 1e6)
        process.board.check()
    return found


def main() -> None:
    """Measure here, with both tools, and write case -> tool -> measure -> values."""
    tools, line = find_tools(())
    by_name = {tool.name: tool for tool in tools}
    criu = by_name.get("criu")
    if not isinstance(criu, Criu):
        raise SystemExit(line)
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        for chain in (Chain("ckpt", _add_by_ckpt), _chain_of_criu(criu)):
            for case, values in _measure_chain(chain, Path(directory)).items():
                found.setdefault(case, {})[chain.name] = values
    partial = Path(sys.argv[1] + ".partial")
    partial.write_text(json.dumps(found))
    os.rename(partial, sys.argv[1])


if __name__ == "__main__":
    main()
