"""Many system calls of our own in one go: what a frozen target waits for must not wait for Python.

A call through `ctypes` or `os` costs some microseconds of interpreter, most of what the kernel has
to do costs less than one. So the calls are laid out as a table, before the target is stopped where
that can be, and a few instructions of machine code (`arch.BURST_CODE`) make them one after the
other. No call sees the result of another one. Where this process may have no executable memory of
its own (a security module), they are made one by one; that is all that is different then.

    table of 8 words each:   number | six arguments | result (negative: an errno)
"""

import ctypes
import mmap
import struct
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache

from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.libc import readable_address, syscall, writable_address

_WORDS = arch.CALL_SIZE // 8
_RESULT = 7
_MASK = 0xFFFF_FFFF_FFFF_FFFF
_PADDING = tuple((0,) * (_RESULT - n_args) for n_args in range(_RESULT))
"""What follows the arguments, by how many there are."""
_SIGNED, _UNSIGNED = struct.Struct("<8q"), struct.Struct("<8Q")


def _pack(nr: NR, args: tuple[int, ...]) -> bytes:
    padding = _PADDING[len(args)]
    try:
        return _SIGNED.pack(nr, *args, *padding)
    except struct.error:
        return _UNSIGNED.pack(nr, *(arg & _MASK for arg in args), *padding)


class Burst:
    """A table of system calls; may be run many times."""

    def __init__(self) -> None:
        """Begin with no call."""
        self._table = array("Q")

    def __len__(self) -> int:
        """Return the number of calls."""
        return len(self._table) // _WORDS

    def add(self, nr: NR, *args: int) -> int:
        """Append a call and return its index; buffers that it names are kept alive by the caller.

        Args:
            nr: the call.
            args: at most six; signed ones down to -2**63.
        """
        index = len(self._table) // _WORDS
        self._table.frombytes(_pack(nr, args))
        return index

    def replace(self, index: int, nr: NR, *args: int) -> None:
        """Put another call in the place of one that was added."""
        at = index * _WORDS
        self._table[at : at + _WORDS] = array("Q", _pack(nr, args))

    def run(self) -> Sequence[int]:
        """Make all calls in their order, in this thread; return their results.

        A failed call does not end the run: its result is the negative errno.
        """
        if self._table:
            address, n_words = self._table.buffer_info()
            _runner()(address, address + n_words * self._table.itemsize)
        return memoryview(self._table).cast("B").cast("q")[_RESULT::_WORDS].tolist()


_ALIGN = 16
_CHUNK_BYTES = 1 << 16


class BurstWithRoom(Burst):
    """A table of calls, and the memory that they read and fill."""

    def __init__(self) -> None:
        """Begin with no call."""
        super().__init__()
        self._memory = bytearray()
        self._address = self._used = 0
        self._kept: list[bytearray] = []

    def take(self, n_bytes: int) -> tuple[bytearray, int, int]:
        """Return memory that stays where it is, an offset in it, and the address of that."""
        at = self._used
        if at + n_bytes > len(self._memory):
            # Not `bytearray(n)`: the kernel would have to find pages when it fills them.
            self._memory = bytearray(b"\0") * max(_CHUNK_BYTES, n_bytes)
            self._address, _ = writable_address(self._memory)
            self._kept.append(self._memory)
            at = 0
        self._used = at + n_bytes + -n_bytes % _ALIGN
        return self._memory, at, self._address + at


_Runner = Callable[[int, int], object]


@lru_cache(maxsize=1)
def _runner() -> _Runner:
    """Return what makes the calls of a table, given its first and last address."""
    code = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    code.write(arch.BURST_CODE)
    address, size = readable_address(code)
    try:
        syscall(NR.mprotect, address, size, mmap.PROT_READ | mmap.PROT_EXEC)
    except OSError:
        return run_one_by_one
    function: _Runner = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(address)
    # The function does not keep the memory that it is in.
    _kept.append(code)
    return function


_kept: list[mmap.mmap] = []


def run_one_by_one(start: int, end: int) -> None:
    """Make the calls of the table at these addresses without machine code of ours."""
    words = (ctypes.c_int64 * ((end - start) // 8)).from_address(start)
    for at in range(0, len(words), _WORDS):
        nr, *args = words[at : at + _RESULT]
        try:
            words[at + _RESULT] = syscall(nr, *args)
        except OSError as error:
            words[at + _RESULT] = -(error.errno or 0)
