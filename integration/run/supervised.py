"""Runs workloads under `ckpt run --json`, and speaks with both over the one stream that they share.

with Supervised(line("writer"), image, cwd=tmp_path) as work:
    work.event("checkpoint")
    assert work.ask("check") == "ok"
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections import deque
from pathlib import Path
from typing import Any

from integration.harness import CKPT
from integration.workloads.build import build
from integration.workloads.driver import ANSWER_S, Dialogue, descendants, end_orphans

OFTEN = ("--every", "100ms")
NEVER = ("--every", "1d")


def line(name: str, *arguments: str) -> list[str]:
    """Return the command line of a workload."""
    return [str(build(name)), *arguments]


class Supervised(Dialogue):
    """`ckpt run` with what it protects; both are killed at the end of a `with`."""

    def __init__(
        self, command: list[str], image: Path, *options: str, cwd: Path, **more: Any
    ) -> None:
        self.command = command
        self.process = subprocess.Popen(
            [*CKPT, "run", "--json", *options, str(image), "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            **more,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        super().__init__(self.process.stdin.fileno(), self.process.stdout.fileno())
        self._events: deque[dict[str, Any]] = deque()
        self._answers: deque[str] = deque()
        self.root = 0

    def event(self, *names: str) -> dict[str, Any]:
        """Return the next event of one of these names; those before it are dropped.

        Raises:
            AssertionError: `ckpt run` has ended without it; in its own words.
        """
        while True:
            while not self._events:
                self._sort()
            event = self._events.popleft()
            if event["event"] in names:
                return event

    def answer(self) -> str:
        """Return the next line of the program."""
        while not self._answers:
            self._sort()
        return self._answers.popleft()

    def ask(self, command: str, timeout_s: float = ANSWER_S) -> str:
        del timeout_s
        self.tell(command)
        return self.answer()

    def _sort(self) -> None:
        try:
            got = self.line()
        except EOFError:
            raise AssertionError(self.said_at_end()) from None
        if got.startswith('{"event"'):
            event = json.loads(got)
            self.root = int(event.get("pid", self.root))
            self._events.append(event)
        else:
            self._answers.append(got)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; what it says last must fit into its pipes."""
        return self.process.wait(ANSWER_S)

    def said_at_end(self) -> str:
        self.wait()
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def kill(self) -> None:
        """Kill `ckpt run` alone; what it protects goes on, and will be reaped when it ends."""
        self.signal(signal.SIGKILL)
        self.wait()
        reap_later(self.root)

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(self, *_: object) -> None:
        family = descendants(self.process.pid)
        if is_of(self.root, self.command):
            family |= {self.root}
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.wait()
        end_orphans(family)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def is_of(pid: int, command: list[str]) -> bool:
    """Tell whether a process lives that runs this command."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return words[:-1] == [os.fsencode(word) for word in command]


def reap_later(pid: int) -> None:
    """Reap an orphan whenever it ends, if it was given to us, as init would at once."""

    def reap() -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

    threading.Thread(target=reap, daemon=True).start()
