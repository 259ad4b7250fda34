"""Map, write, move and unmap pages on command, and do nothing else to these mappings.

A command is a line of JSON, answered with a number after it was done, so no test has to wait or
to guess. Uses nothing but the standard library: it must start fast on an emulated processor.
"""

import ctypes
import json
import mmap
import sys
from pathlib import Path

PAGE = mmap.PAGESIZE
# include/uapi/linux/mman.h, asm-generic/mman-common.h
PROT_NONE = 0
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MAP_FIXED_NOREPLACE = 0x100000
MADV_NOHUGEPAGE = 15
MAP_FAILED = ctypes.c_void_p(-1).value


def main() -> None:
    """Obey until there is nothing more to read."""
    commands = Commands()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(getattr(commands, name)(*arguments), flush=True)


class Commands:
    """What it can do; the names are those of `PagesProcess`."""

    def __init__(self) -> None:
        """Declare the calls of the C library."""
        self.libc = ctypes.CDLL(None, use_errno=True)
        number, size = ctypes.c_void_p, ctypes.c_size_t
        for name in ("mmap", "mremap"):
            getattr(self.libc, name).restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [number, size, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.mremap.argtypes = [number, size, size, ctypes.c_int, number]
        self.libc.munmap.argtypes = [number, size]
        self.libc.madvise.argtypes = [number, size, ctypes.c_int]
        self.libc.mprotect.argtypes = [number, size, ctypes.c_int]

    def hello(self) -> int:
        return int(Path("/proc/self").readlink().name)

    def map(self, n_pages: int, at: int, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_FIXED_NOREPLACE if at else 0)
        addr = self.libc.mmap(at or None, n_pages * PAGE, prot, flags, -1, 0)
        assert addr != MAP_FAILED
        assert addr == at or not at
        self.advise(addr, n_pages, MADV_NOHUGEPAGE)
        return int(addr)

    def unmap(self, addr: int, n_pages: int) -> int:
        assert self.libc.munmap(addr, n_pages * PAGE) == 0
        return 0

    def move(self, addr: int, n_pages: int) -> int:
        # A hole that is known to be elsewhere; MREMAP_FIXED replaces it.
        hole = self.map(n_pages, 0, PROT_NONE)
        flags, len_bytes = MREMAP_MAYMOVE | MREMAP_FIXED, n_pages * PAGE
        assert self.libc.mremap(addr, len_bytes, len_bytes, flags, hole) == hole
        return hole

    def resize(self, addr: int, n_pages: int, new_n_pages: int) -> int:
        sizes = n_pages * PAGE, new_n_pages * PAGE
        new = self.libc.mremap(addr, *sizes, MREMAP_MAYMOVE, None)
        assert new != MAP_FAILED
        return int(new)

    def advise(self, addr: int, n_pages: int, advice: int) -> int:
        assert self.libc.madvise(addr, n_pages * PAGE, advice) == 0
        return 0

    def protect(self, addr: int, n_pages: int, prot: int) -> int:
        assert self.libc.mprotect(addr, n_pages * PAGE, prot) == 0
        return 0

    def write(self, addr: int, pages: list[int]) -> int:
        for page in pages:
            ctypes.memset(addr + page * PAGE, 0xA5, 1)
        return 0

    def read(self, addr: int, pages: list[int]) -> int:
        return sum(ctypes.string_at(addr + page * PAGE, 1)[0] for page in pages)


if __name__ == "__main__":
    main()
