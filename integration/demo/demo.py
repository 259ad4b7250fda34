"""`make demo`: checkpoint a working program four times, kill it, bring it back, see it go on.

    demo.py [--at N]        restore generation N instead of the newest

Uses nothing but the commands of the README.
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

CKPT = [str(Path(sys.executable).parent / "ckpt")]
PROGRAM = Path(__file__).with_name("primes.py")
LINES_BETWEEN = 8
_PR_SET_CHILD_SUBREAPER = 36
console = Console(width=110)


def ckpt(*args: str) -> dict[str, object]:
    """Run a command with --json; end the demo with its message if it fails."""
    done = subprocess.run([*CKPT, *args], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"demo: 'ckpt {' '.join(args)}' ended with {done.returncode}")
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


def read_lines(path: Path) -> list[str]:
    """Return what the program has said so far, whole lines only."""
    return re.findall(r"^tick (.*) \(.*\)\n", path.read_text(encoding="ascii"), re.MULTILINE)


def wait_for_lines(path: Path, n_lines: int, pidfd: int) -> str:
    """Wait for the program to say `n_lines` in all; a poll of its pidfd paces, and sees its end."""
    while True:
        lines = read_lines(path)
        if len(lines) >= n_lines:
            return lines[n_lines - 1]
        if select.select([pidfd], [], [], 0.02)[0]:
            sys.exit("demo: the program ended")


@contextlib.contextmanager
def watched(pid: int) -> Iterator[int]:
    """Lend a pidfd."""
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def end(pid: int) -> None:
    """Kill a process of ours and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError), watched(pid) as pidfd:
        os.kill(pid, signal.SIGKILL)
        select.select([pidfd], [], [])
        # An orphan of `restore --detach` is ours to reap; its pid is taken until then.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def show(rows: list[tuple[dict[str, object], str]]) -> None:
    """Print the table of generations."""
    table = Table(title="the chain")
    for name in ("generation", "kind", "freeze ms", "pages stored", "unchanged", "MB", "at"):
        table.add_column(name, justify="right")
    for row, text in rows:
        pages = row["pages"]
        assert isinstance(pages, dict)
        table.add_row(
            str(row["generation"]),
            str(row["kind"]),
            f"{row['freeze_ms']:.1f}",
            str(pages["data"]),
            str(pages["parent"]),
            f"{int(str(row['bytes'])) / 1e6:.2f}",
            text,
        )
    console.print(table)


def checkpoint(pid: int, image: Path, progress: Path) -> list[tuple[dict[str, object], str]]:
    """Take a full and three incremental checkpoints while the program works."""
    rows = []
    with watched(pid) as pidfd:
        for number in range(4):
            text = wait_for_lines(progress, len(read_lines(progress)) + LINES_BETWEEN, pidfd)
            kind = ["--incremental"] if number else []
            row = ckpt("dump", "--pid", str(pid), *kind, "--json", str(image))
            console.print(f"checkpoint {number} ({row['kind']}) at: {text}")
            rows.append((row, text))
    return rows


def come_back(image: Path, progress: Path, at: int | None) -> None:
    """Restore, and show that the program goes on from where the checkpoint was."""
    n_lines = len(read_lines(progress))
    generation = [] if at is None else ["--at", str(at)]
    back = ckpt("restore", "--detach", *generation, "--json", str(image))
    pid = int(str(back["pid"]))
    try:
        with watched(pid) as pidfd:
            text = wait_for_lines(progress, n_lines + 1, pidfd)
            console.print(
                f"restored generation {back['generation']} as pid {pid}"
                f" in {back['restore_ms']:.0f} ms; it goes on: {text}"
            )
    finally:
        end(pid)


def become_subreaper() -> None:
    """Make the orphans of `ckpt restore --detach` our children."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main() -> None:
    become_subreaper()
    parser = argparse.ArgumentParser()
    parser.add_argument("--at", type=int, help="restore this generation too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckpt-demo-") as directory:
        progress, image = Path(directory, "progress.txt"), Path(directory, "image")
        progress.touch()
        command = [sys.executable, str(PROGRAM), str(progress)]
        null = subprocess.DEVNULL
        program = subprocess.Popen(command, stdin=null, stdout=null, stderr=null)
        try:
            rows = checkpoint(program.pid, image, progress)
        finally:
            program.kill()
            program.wait()
        console.print(f"killed with SIGKILL at: {read_lines(progress)[-1]}")
        come_back(image, progress, None)
        come_back(image, progress, 1 if args.at is None else args.at)
        show(rows)


if __name__ == "__main__":
    main()
