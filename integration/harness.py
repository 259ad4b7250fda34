"""Runs workloads under `ckpt`, as a user would: the command, its exit codes, its JSON.

with Program("writer", "--rate", "2000", cwd=tmp_path) as work:
    dump(work.pid, image)
with Restored(image) as work:
    assert work.ask("check") == "ok"
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from integration.workloads.driver import (
    ANSWER_S,
    Dialogue,
    descendants,
    end_orphans,
    remove_shared_memory,
)

CKPT = (sys.executable, "-c", "import sys; from ckpt.cli.main import main; sys.exit(main())")
_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Make orphans of ours our children, so that their pids are free once we reap them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def ckpt(*args: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever that is."""
    command = [*CKPT, *map(str, args)]
    more = {"stdin": subprocess.DEVNULL} | more
    return subprocess.run(command, text=True, check=False, capture_output=True, **more)


def dump(pid: int, image: Path, *options: str, incremental: bool = True) -> dict[str, Any]:
    """Take a checkpoint and return what it says of itself; fails the test in ckpt's own words."""
    more = ["--incremental"] if incremental else []
    done = ckpt("dump", "--pid", str(pid), *more, *options, "--json", image)
    assert done.returncode == 0, f"dump ended with {done.returncode}\n{done.stderr}"
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


class Restored(Dialogue):
    """The workload of an image directory, brought back with new pipes; killed at the end."""

    def __init__(self, image: Path, *options: str, pass_fds: Collection[int] = ()) -> None:
        self.process = subprocess.Popen(
            [*CKPT, "restore", "--json", *options, str(image)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        super().__init__(self.process.stdin.fileno(), self.process.stdout.fileno())
        try:
            self.said = self._result()
        except EOFError:
            self.process.kill()
            with self.process.stderr as stderr:
                said = stderr.read().decode()
            self._close()
            raise AssertionError(f"restore failed: {said}") from None
        self.pid = int(self.said["pid"])
        self._family: set[int] = set()

    def _result(self) -> dict[str, Any]:
        """Return what `ckpt restore` says; the program runs by then, and may speak before it."""
        early: list[str] = []
        while '"restore_ms"' not in (line := self.line()):
            early.append(line)
        self._held = "".join(f"{line}\n" for line in early).encode() + self._held
        result = json.loads(line)
        assert isinstance(result, dict)
        return result

    def quit(self) -> int:
        """Tell it to end and return its exit status, which is that of `ckpt restore`."""
        self._family = descendants(self.pid)
        self.tell("quit")
        return self.process.wait(ANSWER_S)

    def _close(self) -> None:
        self.process.wait(ANSWER_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._family |= descendants(self.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._close()
        if self.process.stderr is not None:
            with self.process.stderr as stderr:
                if error is not None:
                    os.set_blocking(stderr.fileno(), False)
                    said = (stderr.read() or b"").decode()
                    error.add_note(f"ckpt restore ended with {self.process.returncode}: {said}")
        end_orphans(self._family)
        remove_shared_memory(self.pid)
