"""Starts real programs, and notes what their checkpoints cost.

Every program has pipes for standard streams: what it says on them is how a test knows where it is.
"""

import os
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from ckpt.kernel.features import probe_features
from integration.workloads.driver import ANSWER_S, Dialogue, descendants, end_orphans

PROGRAMS = Path(__file__).parent / "programs"


def offered_trackers() -> list[str]:
    """Return the trackers that this kernel has, the one that is chosen by itself first."""
    features = probe_features()
    offered = ["writeprotect"] * features.uffd_wp_async + ["softdirty"] * features.soft_dirty
    return [*offered, "compare", "full"]


class App(Dialogue):
    """A program that was started here; killed with its family at the end of a `with`."""

    def __init__(self, command: Sequence[str | Path], cwd: Path) -> None:
        self.process = subprocess.Popen(
            list(map(str, command)),
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
        self.pid = self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        family = descendants(self.pid) if self.process.poll() is None else set()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(ANSWER_S)
        end_orphans(family)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Costs:
    """The figures of one chain, for whoever reads the test's report (or runs it with -s)."""

    def __init__(self, record_property: Any, name: str) -> None:
        self._record_property = record_property
        self._name = name

    def note(self, dumped: dict[str, Any]) -> None:
        pages = dumped["pages"]
        text = (
            f"{dumped['kind']}: freeze {dumped['freeze_ms']:.1f} ms, wall {dumped['wall_ms']:.0f}"
            f" ms, {dumped['bytes'] / 1e6:.2f} MB, pages {pages['data']} stored"
            f" {pages['parent']} unchanged {pages['zero']} zero"
        )
        self._say(f"generation {dumped['generation']}", text)

    def note_restore(self, said: dict[str, Any]) -> None:
        self._say(f"restore of {said['generation']}", f"{said['restore_ms']:.0f} ms")

    def _say(self, key: str, text: str) -> None:
        self._record_property(key, text)
        print(f"{self._name}: {key}: {text}")


def kind_of_further_dumps(tracker: str) -> str:
    """Return what an incremental dump makes with a tracker: `full` has no deltas."""
    return "full" if tracker == "full" else "delta"


def reap_killed(pids: Iterable[int]) -> None:
    """Reap what `ckpt dump --kill` has ended, orphans of ours: their numbers are free then."""
    for pid in pids:
        status = os.waitpid(pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"{pid}: {status}"


def is_running(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")
