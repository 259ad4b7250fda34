"""Runs `ckpt` as a user would, and notes what the tests' harness does not: time and memory."""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from integration.harness import CKPT


def environment() -> dict[str, str]:
    """Return ours, in which Python keeps compiled modules as it does for an installed package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


@attrs.frozen
class Run:
    """A command that ended well."""

    said: Mapping[str, Any]
    """The object that `--json` printed."""
    started_ns: int
    """CLOCK_MONOTONIC right before the fork."""
    wall_ms: float
    """Until its end was seen."""
    peak_mib: float
    """The most memory that it had resident. The kernel counts from the fork on, so never less than
    ours: this process stays small."""


def run(command: Sequence[str]) -> Run:
    """Run a command that prints JSON; its own words if it fails.

    Raises:
        RuntimeError: it failed.
    """
    started_ns = time.monotonic_ns()
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said, complaint = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall_ms = (time.monotonic_ns() - started_ns) / 1e6
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {complaint.decode()}")
    return Run(json.loads(said), started_ns, wall_ms, usage.ru_maxrss / 1024)


def dump(pid: int, image: Path, *, incremental: bool = True) -> Run:
    """Take a checkpoint."""
    more = ["--incremental"] if incremental else []
    return run([*CKPT, "dump", "--pid", str(pid), *more, "--json", str(image)])


def read_peak_mib(pid: int) -> float:
    """Return the most memory that a running process had resident."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    (line,) = (line for line in text.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
