"""The two tools, run as a user would, with what they cost: time, memory, bytes, and the freeze."""

import contextlib
import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from integration.bench.build import build
from integration.bench.criu import default_cache, enter_private_run, find_criu
from integration.kernels.apt import AptError

CKPT = (sys.executable, "-c", "import sys; from ckpt.cli.main import main; sys.exit(main())")
_PR_SET_CHILD_SUBREAPER = 36


def environment() -> dict[str, str]:
    """Return ours, in which Python keeps compiled modules as it does for an installed package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class ToolFailed(Exception):
    """A tool did not do what it was asked for; the message holds its own words."""


@attrs.frozen
class Run:
    """A command that ended well."""

    said: str
    started_ns: int
    """CLOCK_REALTIME right before the fork."""
    wall_ms: float
    peak_mib: float
    """The most memory that it, or a child that it waited for, had resident."""
    cpu_ms: float


def run(command: Sequence[str], *, warm_mib: int = 0) -> Run:
    """Run a command to its end, after so much free memory was touched.

    Raises:
        ToolFailed: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-") as directory:
        report, said = Path(directory, "report"), Path(directory, "said")
        # A file and no pipe: what stays behind of a restore may hold it open.
        with said.open("wb") as output:
            subprocess.run(
                [build("launch"), str(report), str(warm_mib), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
                env=environment(),
            )
        started, ended, kib, user_us, system_us, status = map(int, report.read_text().split())
        words = said.read_text(errors="replace")
    if status:
        raise ToolFailed(f"{' '.join(command)}: {words[-2000:]}")
    cpu_ms = (user_us + system_us) / 1e3
    return Run(words, started, (ended - started) / 1e6, kib / 1024, cpu_ms)


class Tool(Protocol):
    """What both can do."""

    name: str

    def dump(self, pid: int, image: Path, *, warm_mib: int = 0) -> Run:
        """Write a full image of a process, which goes on."""

    def restore(self, image: Path, *, warm_mib: int = 0) -> Run:
        """Bring it back with its pid, and return while it runs."""


@attrs.frozen
class Ckpt:
    """`ckpt` of this checkout."""

    options: tuple[str, ...] = ()
    name: str = "ckpt"

    def dump(self, pid: int, image: Path, *, warm_mib: int = 0, incremental: bool = False) -> Run:
        more = ["--incremental"] if incremental else []
        words = ["dump", "--pid", str(pid), *more, *self.options, "--json", str(image)]
        return run([*CKPT, *words], warm_mib=warm_mib)

    def restore(self, image: Path, *, warm_mib: int = 0, lazy: bool = False) -> Run:
        more = ["--lazy"] if lazy else []
        return run([*CKPT, "restore", "--detach", *more, "--json", str(image)], warm_mib=warm_mib)


def said_by_ckpt(done: Run) -> Mapping[str, Any]:
    """Return the object that `ckpt --json` printed, among whatever else it said."""
    for line in done.said.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(found := json.loads(line), dict):
                return found
    raise ToolFailed(f"no object in {done.said!r}")


@functools.cache
def ckpt_offers(command: str, option: str) -> bool:
    """Tell whether `ckpt COMMAND` knows an option."""
    return option in run([*CKPT, command, "--help"]).said


@attrs.frozen
class Criu:
    """CRIU from its cache; each image is a directory."""

    command: tuple[str, ...]
    name: str = "criu"

    def dump(self, pid: int, image: Path, *, warm_mib: int = 0, more: tuple[str, ...] = ()) -> Run:
        image.mkdir(parents=True)
        words = ["dump", "--tree", str(pid), "--images-dir", str(image), "--leave-running"]
        return self._run([*words, *more, "-v1", "-o", "dump.log"], image, warm_mib)

    def restore(self, image: Path, *, warm_mib: int = 0) -> Run:
        words = ["restore", "--images-dir", str(image), "--restore-detached"]
        return self._run([*words, "-v1", "-o", "restore.log"], image, warm_mib)

    def _run(self, words: list[str], image: Path, warm_mib: int) -> Run:
        try:
            return run([*self.command, *words], warm_mib=warm_mib)
        except ToolFailed as exc:
            log = (image / f"{words[0]}.log").read_text(errors="replace")
            raise ToolFailed(f"{exc}\n{log[-2000:]}") from exc


@attrs.frozen
class Bench:
    """What every section needs: who is compared, and where there is room."""

    tools: tuple[Tool, ...]
    work: Path
    """Working directory of the targets, on disk."""
    tmpfs: Path
    disk: Path
    n_rounds: int | None = None
    """As asked for by the user."""

    def rounds(self, usual: int) -> int:
        """Return how often to measure."""
        return self.n_rounds or usual

    @property
    def ckpt(self) -> Ckpt:
        """The one that is always there."""
        (found,) = (tool for tool in self.tools if isinstance(tool, Ckpt))
        return found

    def in_turn(self, n: int) -> tuple[Tool, ...]:
        """Return the tools, each of them first in every second round."""
        return self.tools if n % 2 == 0 else self.tools[::-1]

    @contextlib.contextmanager
    def image(self, *, on_disk: bool = False) -> Iterator[Path]:
        """Lend a path for an image; what is there in the end is removed."""
        parent = Path(tempfile.mkdtemp(dir=self.disk if on_disk else self.tmpfs))
        try:
            yield parent / "image"
        finally:
            shutil.rmtree(parent)


def bytes_on_disk(image: Path) -> int:
    """Return what the files of an image hold."""
    return sum(path.stat().st_size for path in image.rglob("*") if path.is_file())


def find_tools(options: Sequence[str]) -> tuple[tuple[Tool, ...], str]:
    """Return the tools, and a line on what is missing, or which version there is.

    From here on this process reaps orphans, and has a /run of its own if there is CRIU.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ckpt = Ckpt(tuple(options))
    try:
        command = find_criu(default_cache())
        enter_private_run()
    except (AptError, OSError) as exc:
        return (ckpt,), f"ckpt alone, for CRIU is not to be had: {str(exc).splitlines()[0]}"
    version = run([*command, "--version"]).said.split("\n")[0].removeprefix("Version: ")
    return (ckpt, Criu(tuple(command))), f"beside CRIU {version}"


def reap_orphans() -> None:
    """Reap what the tools left behind and has ended: who started it will not."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@attrs.frozen
class Dumped:
    """One dump, as the process felt it."""

    gap_ms: float
    done: Run
