"""Speak the workloads' line protocol over a pair of pipes, whoever the process at the other end is.

`Program` starts a workload itself; `Dialogue` alone serves a restored process, which was given new
pipes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from pathlib import Path

from integration.workloads.build import build

ANSWER_S = 60.0  # far beyond what any command needs: only a hang reaches it


class Dialogue:
    """One command, one answer, over file descriptors that the caller owns."""

    def __init__(self, commands_fd: int, answers_fd: int) -> None:
        self._commands_fd = commands_fd
        self._answers_fd = answers_fd
        self._held = b""

    def line(self, timeout_s: float = ANSWER_S) -> str:
        """Return the next line without its newline.

        Raises:
            TimeoutError: nothing came for so long.
            EOFError: the program closed its output.
        """
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._held:
            left = deadline - time.monotonic()
            ready = select.select([self._answers_fd], [], [], max(left, 0))[0]
            if not ready:
                raise TimeoutError(f"no answer in {timeout_s} s, got {self._held!r}")
            chunk = os.read(self._answers_fd, 4096)
            if not chunk:
                raise EOFError(f"output closed after {self._held!r}")
            self._held += chunk
        answer, _, self._held = self._held.partition(b"\n")
        # What is no text is shown by the assertion that wanted another answer.
        return answer.decode(errors="backslashreplace")

    def tell(self, command: str) -> None:
        """Send a command, do not wait for its answer."""
        os.write(self._commands_fd, command.encode() + b"\n")

    def ask(self, command: str, timeout_s: float = ANSWER_S) -> str:
        """Send a command and return its answer."""
        self.tell(command)
        return self.line(timeout_s)


def descendants(pid: int) -> set[int]:
    """Return the processes below `pid`, at any depth; one that ends meanwhile has none."""
    found: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found |= {child} | descendants(child)
    return found


def end_orphans(pids: set[int]) -> None:
    """End what a workload has left behind, so that its numbers are free.

    Orphans are ours if we are a subreaper (`harness.become_subreaper`), and init's otherwise; in
    either case not before their parents have ended.
    """
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    left, parents = pids, pids | {os.getpid()}
    while left := {pid for pid in left if not _is_reaped(pid) and _parent(pid) in parents}:
        os.sched_yield()


def _is_reaped(pid: int) -> bool:
    # Not waited for: the init of a pid namespace ends only when all others there were reaped.
    try:
        return os.waitpid(pid, os.WNOHANG) != (0, 0)
    except ChildProcessError:
        return not os.path.exists(f"/proc/{pid}")


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def remove_shared_memory(pid: int) -> None:
    """Remove what a workload that was killed has left in /dev/shm under its name."""
    for path in Path("/dev/shm").glob(f"s_*-{pid}-*"):
        path.unlink(missing_ok=True)


class Program(Dialogue):
    """A workload that was started here and has said `ready`; killed at the end of a `with`."""

    def __init__(self, name: str, *arguments: str, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [build(name), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What pytest captures into is a deleted file, which is no state to keep.
            stderr=subprocess.DEVNULL,
            cwd=cwd,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        super().__init__(self.process.stdin.fileno(), self.process.stdout.fileno())
        self._family: set[int] = set()
        first = self.line()
        if first != "ready":
            raise RuntimeError(f"{name} said {first!r} instead of ready")

    @property
    def pid(self) -> int:
        return self.process.pid

    def quit(self) -> int:
        """Tell it to end and return its exit status."""
        self._family = descendants(self.pid)
        self.tell("quit")
        return self.process.wait(ANSWER_S)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self._family |= descendants(self.pid)
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(ANSWER_S)
        end_orphans(self._family)
        remove_shared_memory(self.pid)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
