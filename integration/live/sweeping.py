"""The program `sweeper`, found among the processes with whatever looks like it."""

import contextlib
import os
import secrets
import select
from pathlib import Path

from integration.workloads.driver import Program

UNHARMED = "children none sigchld 0"


class Sweeper(Program):
    """A process with a token in its command line that only its clones have, too."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        super().__init__("sweeper", "--token", secrets.token_hex(8), *arguments, cwd=cwd)
        self._cmdline = Path(f"/proc/{self.pid}/cmdline").read_bytes()

    def clones(self) -> list[int]:
        """Return who else has its command line, and so its memory."""
        found = []
        for directory in Path("/proc").iterdir():
            if directory.name.isdecimal() and int(directory.name) != self.pid:
                with contextlib.suppress(OSError):
                    if (directory / "cmdline").read_bytes() == self._cmdline:
                        found.append(int(directory.name))
        return found

    def await_clones(self, timeout_s: float) -> int:
        """Wait for the end of all clones, also of one that is being made; return how many."""
        n_clones = 0
        while clones := self.clones():
            for pid in clones:
                assert wait_for_end(pid, timeout_s), f"clone {pid} goes on"
            n_clones += len(clones)
        return n_clones

    def children(self) -> str:
        """Return its children, zombies too, as the kernel lists them."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return "".join((task / "children").read_text() for task in tasks)

    def outside(self) -> tuple[list[str], list[str]]:
        """Return its descriptors and its mappings."""
        fds = Path(f"/proc/{self.pid}/fd")
        links = sorted(f"{fd.name} {os.readlink(fd)}" for fd in fds.iterdir())
        return links, Path(f"/proc/{self.pid}/maps").read_text().splitlines()

    def expect_unharmed(self) -> None:
        assert self.ask("children") == UNHARMED
        assert self.children() == ""


def wait_for_end(pid: int, timeout_s: float) -> bool:
    """Wait for a process that need not be ours; False if it goes on."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)
