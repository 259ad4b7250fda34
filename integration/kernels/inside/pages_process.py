"""A process that maps, writes, moves and unmaps pages on command (see `pages_program.py`)."""

import contextlib
import json
import mmap
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

PAGE = mmap.PAGESIZE
PROGRAM = Path(__file__).with_name("pages_program.py")


@attrs.frozen
class PagesProcess:
    """The process, seen from the test. Addresses are numbers, pages are counted from a mapping."""

    popen: subprocess.Popen[str]

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator["PagesProcess"]:
        """Start it; end it at the end of the block."""
        with subprocess.Popen(
            [sys.executable, "-I", "-S", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as popen:
            process = cls(popen)
            assert process._do("hello") == popen.pid
            yield process
            assert popen.stdin
            popen.stdin.close()
            assert popen.wait() == 0

    @property
    def proc(self) -> Path:
        """Its directory in /proc."""
        return Path(f"/proc/{self.popen.pid}")

    def map(self, n_pages: int, at: int = 0) -> int:
        """Map private anonymous memory, without huge pages; return its address."""
        return self._do("map", n_pages, at)

    def unmap(self, addr: int, n_pages: int) -> None:
        """Unmap."""
        self._do("unmap", addr, n_pages)

    def move(self, addr: int, n_pages: int) -> int:
        """Move to a new address with mremap; return that."""
        return self._do("move", addr, n_pages)

    def resize(self, addr: int, n_pages: int, new_n_pages: int) -> int:
        """Shrink or grow with mremap, moved if need be; return the address."""
        return self._do("resize", addr, n_pages, new_n_pages)

    def advise(self, addr: int, n_pages: int, advice: int) -> None:
        """Call madvise."""
        self._do("advise", addr, n_pages, advice)

    def protect(self, addr: int, n_pages: int, prot: int) -> None:
        """Call mprotect."""
        self._do("protect", addr, n_pages, prot)

    def write(self, addr: int, pages: Iterable[int]) -> None:
        """Write a byte into each of `pages`."""
        self._do("write", addr, list(pages))

    def read(self, addr: int, pages: Iterable[int]) -> None:
        """Read a byte of each of `pages`."""
        self._do("read", addr, list(pages))

    def _do(self, *command: object) -> int:
        assert self.popen.stdin
        assert self.popen.stdout
        print(json.dumps(command), file=self.popen.stdin, flush=True)
        return int(self.popen.stdout.readline())
