"""Full dumps of much memory, and their way back."""

import shutil
from collections import defaultdict
from pathlib import Path

from integration.bench import commands
from integration.bench.reference import (
    Heartbeat,
    time_fresh_memory,
    time_readv_stream,
    time_write,
)
from integration.bench.sample import Goal, Sample, Section
from integration.harness import Restored

ROUNDS = {256: 4, 1024: 2}
_PEAK_GOAL_MIB = 200


def measure(directory: Path) -> list[Section]:
    """Return one section for each size."""
    return [_measure_size(directory, mib, n) for mib, n in ROUNDS.items()]


def _measure_size(directory: Path, mib: int, n_rounds: int) -> Section:
    values: dict[str, list[float]] = defaultdict(list)
    image = directory / f"full-{mib}"
    for _ in range(n_rounds):
        with Heartbeat(mib, cwd=directory) as target:
            found = _measure_dump(target, image)
            # The references lie between dump and restore, and are as near to one as to the other.
            n_bytes = target.n_pages * 4096
            found["readv"] = time_readv_stream(target.pid, target.address, n_bytes)
            found["fresh"] = time_fresh_memory(n_bytes)
            found["write"] = time_write(directory / "written", int(found["stored"]))
        found |= _measure_restore(image)
        shutil.rmtree(image)
        for name, value in found.items():
            values[name].append(value)
    return _section(mib, values)


def _measure_dump(target: Heartbeat, image: Path) -> dict[str, float]:
    target.gap()
    run = commands.dump(target.pid, image, incremental=False)
    return {
        "gap": target.gap()[0],
        "freeze": run.said["freeze_ms"],
        "wall": run.wall_ms,
        "stored": run.said["bytes"],
        "dump peak": run.peak_mib,
    }


def _measure_restore(image: Path) -> dict[str, float]:
    with Restored(image) as back:
        assert back.ask("check") == "ok", "the restored process is not what it was"
        # It waits for the process, so it can still be asked for its own memory.
        peak_mib = commands.read_peak_mib(back.process.pid)
        return {"restore": float(back.said["restore_ms"]), "restore peak": peak_mib}


def _section(mib: int, values: dict[str, list[float]]) -> Section:
    readv = Sample("process_vm_readv of all", "ms", values["readv"])
    write = Sample("write and fsync, as many bytes", "ms", values["write"])
    fresh = Sample("first touch, as much memory", "ms", values["fresh"])
    stored = Sample("stored", "MB", [n / 1e6 for n in values["stored"]])
    peak_goal = Goal(f"under {_PEAK_GOAL_MIB} MiB", _PEAK_GOAL_MIB)
    samples = [
        Sample("gap felt inside", "ms", values["gap"], against=readv),
        Sample("freeze_ms", "ms", values["freeze"], against=readv),
        Sample("whole command", "ms", values["wall"], against=write),
        Sample("peak memory of ckpt dump", "MiB", values["dump peak"], goal=peak_goal),
        stored,
        Sample("restore_ms", "ms", values["restore"], against=fresh),
        Sample("peak memory of ckpt restore", "MiB", values["restore peak"], goal=peak_goal),
        *[readv, write, fresh],
    ]
    note = "the content cannot be compressed, so as many bytes are written as the process has"
    return Section(f"full dump and restore: {mib} MiB", samples, note)
