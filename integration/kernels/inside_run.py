"""Boot a kernel once, run the tests of `inside/` there, and bring their results back."""

import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import attrs

from integration.kernels.images import REPOSITORY, KernelCache, KernelWish, UnpackedKernel
from integration.kernels.vm import SCRATCH, Machine, Outcome, VmError
from integration.workloads.build import build

INSIDE = Path(__file__).resolve().parent / "inside"
TIMEOUT_S = 1500.0
WORKLOADS = ("tracker_cases", "writer")
"""Compiled before the boot: inside, the tree is read-only and a compiler slow."""
HANDED_DOWN = ("CI", "CKPT_CI", "CKPT_STRICT_SKIPS")
"""Variables that change what the tests demand; they hold inside as well."""

ENV_RELEASE = "CKPT_VM_RELEASE"
"""Set inside only: `uname -r` of the kernel that was to be booted."""
ENV_OFFERS = "CKPT_VM_OFFERS"
"""Set inside only: `KernelWish.offers`, separated by blanks."""


@attrs.frozen
class Case:
    """One test that ran inside."""

    module: str
    """Its file's name without `.py`."""
    name: str
    seconds: float
    trouble: str
    """Why it failed or was skipped; empty if it passed."""

    def __str__(self) -> str:
        """One line, and the trouble below it."""
        verdict = "FAILED" if self.trouble else "passed"
        return f"{self.module}::{self.name} {verdict} ({self.seconds:.2f} s)" + (
            "\n" + self.trouble if self.trouble else ""
        )


@attrs.frozen
class InsideRun:
    """All that one boot gave."""

    kernel: UnpackedKernel
    outcome: Outcome
    cases: tuple[Case, ...]


@attrs.define
class Timing:
    """What preparing and running one kernel took, for the summary at the end."""

    series: str
    release: str = ""
    prepare_s: float = 0.0
    boot_s: float = 0.0
    wall_s: float = 0.0
    n_cases: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line."""
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"{self.series}: {self.release or 'not prepared'}: prepare {self.prepare_s:.1f} s,"
            f" boot {self.boot_s:.1f} s, boot to power-off {self.wall_s:.1f} s,"
            f" {self.n_cases} tests inside{notes}"
        )


def prepare(wish: KernelWish, cache: KernelCache, timing: Timing) -> Machine:
    """Fetch what a boot needs, unless it is here."""
    started = time.monotonic()
    kernel = cache.prepare(wish)
    machine = Machine(kernel, cache.prepare_busybox())
    for name in WORKLOADS:
        build(name)
    timing.prepare_s = time.monotonic() - started
    timing.release, timing.notes = kernel.release, kernel.notes
    return machine


def run_inside(machine: Machine, results: Path, timing: Timing) -> InsideRun:
    """Boot `machine` and run the tests of `inside/` with the Python that runs this.

    Raises:
        VmError: the machine failed, or pytest inside came to no result.
    """
    kernel, report = machine.kernel, results / "junit.xml"
    outcome = machine.run(
        [
            *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"),
            *("--junit-xml", str(report), str(INSIDE)),
        ],
        cwd=REPOSITORY,
        env={
            ENV_RELEASE: kernel.release,
            ENV_OFFERS: " ".join(sorted(kernel.wish.offers)),
            # Its default is the repository, which is read-only there.
            "HYPOTHESIS_STORAGE_DIRECTORY": f"{SCRATCH}/hypothesis",
            **{name: os.environ[name] for name in HANDED_DOWN if name in os.environ},
        },
        results=results,
        timeout_s=TIMEOUT_S,
    )
    timing.boot_s, timing.wall_s = outcome.boot_s, outcome.wall_s
    if not report.exists():
        raise VmError(f"pytest inside exit {outcome.exit_code}:\n{outcome.output}")
    cases = parse_junit(report.read_text())
    timing.n_cases = len(cases)
    return InsideRun(kernel, outcome, cases)


def parse_junit(text: str) -> tuple[Case, ...]:
    """Return the tests of a junit report; those that were skipped count as trouble."""
    cases = []
    for node in ElementTree.fromstring(text).iter("testcase"):
        told = [
            f"{child.tag}: {child.get('message', '')}\n{child.text or ''}"
            for child in node
            if child.tag in {"failure", "error", "skipped"}
        ]
        where = node.get("classname", "").split(".")
        module = next((part for part in where if part.startswith("test_")), ".".join(where))
        name = node.get("name", "")
        cases.append(Case(module, name, float(node.get("time", "0")), "\n".join(told)))
    return tuple(cases)
