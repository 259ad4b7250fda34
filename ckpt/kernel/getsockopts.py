"""Many options of a socket asked for in one go: a frozen target must not wait for Python's calls.

    values:   | option 0, padded to 8 | option 1 | ...
    lengths:  | u32 | u32 | ...        set anew for each socket: the kernel writes what it gave

The table of calls (`burst`) is laid out once. It names one descriptor of ours, under which each
socket is put for as long as its options are read.

Source: getsockopt(2).
"""

import os
import struct
from collections.abc import Sequence
from functools import lru_cache

from ckpt.kernel.arch import NR
from ckpt.kernel.burst import Burst
from ckpt.kernel.libc import writable_address

_ALIGNMENT = 8
_INT = struct.Struct("=i")


class Getsockopts:
    """A list of options; may be asked of many sockets."""

    def __init__(self, options: Sequence[tuple[int, int, int]]) -> None:
        """Lay out the calls.

        Args:
            options: level, number and size in bytes of each.
        """
        self._spans: list[tuple[int, int]] = []
        end = 0
        for _, _, size in options:
            self._spans.append((end, size))
            end += (size + _ALIGNMENT - 1) & -_ALIGNMENT
        self._zeros = bytes(end)
        self._sizes = struct.pack(f"={len(options)}I", *(size for _, _, size in options))
        self._lengths_format = struct.Struct(f"={len(options)}I")
        self._values = bytearray(self._zeros)
        self._lengths = bytearray(self._sizes)
        self._calls = Burst()
        if options:
            values_at, _ = writable_address(self._values)
            lengths_at, _ = writable_address(self._lengths)
            for index, (level, number, _) in enumerate(options):
                value = values_at + self._spans[index][0]
                length = lengths_at + 4 * index
                self._calls.add(NR.getsockopt, _place(), level, number, value, length)

    def read(self, fd: int) -> list[bytes | None]:
        """Return the values of a socket's options, in order; None for what it does not have."""
        results = self._run(fd)
        lengths = self._lengths_format.unpack(self._lengths)
        return [
            bytes(self._values[at : at + min(size, length)]) if result >= 0 else None
            for (at, size), length, result in zip(self._spans, lengths, results, strict=True)
        ]

    def read_ints(self, fd: int) -> list[int | None]:
        """Return the same as numbers, where all are ints."""
        results = self._run(fd)
        unpack = _INT.unpack_from
        return [
            unpack(self._values, at)[0] if result >= 0 else None
            for (at, _), result in zip(self._spans, results, strict=True)
        ]

    def _run(self, fd: int) -> Sequence[int]:
        self._values[:] = self._zeros
        self._lengths[:] = self._sizes
        os.dup2(fd, _place(), inheritable=False)
        try:
            return self._calls.run()
        finally:
            # Nobody's socket stays open for longer than it is asked.
            os.dup2(_nothing(), _place(), inheritable=False)


@lru_cache(maxsize=1)
def _nothing() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


@lru_cache(maxsize=1)
def _place() -> int:
    """Return the descriptor under which sockets are put."""
    return os.dup(_nothing())
