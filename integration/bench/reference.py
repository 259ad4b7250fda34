"""What the kernel and the processor ask for the single steps of a dump, done as lean as can be."""

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckpt.kernel import ptrace
from ckpt.units import Tid
from integration.workloads.driver import Program

_PAGE = mmap.PAGESIZE
_IOV_MAX = 1024
_PIECE = 4 << 20  # small, so that this process stays small (see commands.Run)
_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len_bytes", ctypes.c_size_t))


@contextlib.contextmanager
def warm_buffer(n_bytes: int) -> Iterator[mmap.mmap]:
    """Lend memory that was touched before."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    with mmap.mmap(-1, n_bytes, flags=flags) as buffer:
        yield buffer


def address_of(buffer: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def time_memcpy(n_bytes: int) -> float:
    """Return the ms that memcpy takes from warm to warm memory."""
    with warm_buffer(n_bytes) as source, warm_buffer(n_bytes) as into:
        addresses = address_of(into), address_of(source)
        ctypes.memmove(*addresses, n_bytes)
        started = time.perf_counter()
        ctypes.memmove(*addresses, n_bytes)
        return (time.perf_counter() - started) * 1e3


def time_readv(pid: int, starts: Sequence[int], len_bytes: int) -> float:
    """Return the ms that process_vm_readv takes for ranges of equal length into warm memory."""
    total = len(starts) * len_bytes
    remote = (_Iovec * len(starts))(*[(start, len_bytes) for start in starts])
    with warm_buffer(total) as buffer:
        calls = []
        for first in range(0, len(starts), _IOV_MAX):
            n = min(_IOV_MAX, len(starts) - first)
            local = _Iovec(address_of(buffer) + first * len_bytes, n * len_bytes)
            ranges = ctypes.byref(remote, first * ctypes.sizeof(_Iovec))
            calls.append((pid, ctypes.byref(local), 1, ranges, n, 0))
        started = time.perf_counter()
        moved = sum(_libc.process_vm_readv(*call) for call in calls)
        took_s = time.perf_counter() - started
    assert moved == total, f"read {moved} of {total} bytes"
    return took_s * 1e3


def time_readv_stream(pid: int, start: int, n_bytes: int) -> float:
    """Return the ms that process_vm_readv takes for much memory, always into the same buffer."""
    took_ms = 0.0
    with warm_buffer(_PIECE) as buffer:
        local = _Iovec(address_of(buffer), _PIECE)
        for at in range(start, start + n_bytes, _PIECE):
            remote = _Iovec(at, _PIECE)
            started = time.perf_counter()
            moved = _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
            took_ms += (time.perf_counter() - started) * 1e3
            assert moved == _PIECE, f"read {moved} of {_PIECE} bytes"
    return took_ms


def time_fresh_memory(n_bytes: int) -> float:
    """Return the ms that the kernel takes to hand out zeroed memory."""
    started = time.perf_counter()
    for _ in range(0, n_bytes, _PIECE):
        with warm_buffer(_PIECE):
            pass
    return (time.perf_counter() - started) * 1e3


def time_write(path: Path, n_bytes: int) -> float:
    """Return the ms that a new file of so many bytes takes to be on the disk; it is removed."""
    piece = os.urandom(1 << 20)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for at in range(0, n_bytes, len(piece)):
            file.write(piece[: n_bytes - at])
        os.fsync(file.fileno())
    took_s = time.perf_counter() - started
    path.unlink()
    return took_s * 1e3


def time_stop(pid: int) -> float:
    """Return the ms from the first PTRACE_SEIZE to the last PTRACE_DETACH of an empty freeze."""
    tids = [Tid(int(name)) for name in os.listdir(f"/proc/{pid}/task")]
    started = time.perf_counter()
    for tid in tids:
        ptrace.seize(tid, ptrace.Option.NONE)
        ptrace.interrupt(tid)
    for tid in tids:
        ptrace.wait(tid)
    for tid in tids:
        ptrace.detach(tid)
    return (time.perf_counter() - started) * 1e3


class Heartbeat(Program):
    """The workload that measures its own standstill."""

    def __init__(self, mib: int, *, cwd: Path) -> None:
        super().__init__("heartbeat", "--mib", str(mib), "--percent", "1", cwd=cwd)
        address, n_bytes = self.ask("where").split()[1:]
        self.address, self.n_pages = int(address, 16), int(n_bytes) // _PAGE
        self._n_steps = 0

    def gap(self) -> tuple[float, int]:
        """Return the longest gap since the last question in ms, and its beginning in ns."""
        _, length, start = self.ask("gap").split()
        return int(length) / 1e6, int(start)

    def touch(self, n_stores: int, percent: int) -> float:
        """Return the ms that stores into random pages of a part of the memory take."""
        return int(self.ask(f"touch {n_stores} {percent}").split()[1]) / 1e6

    def step(self, name: str) -> tuple[list[int], int]:
        """Write one percent; return the ranges that were written: addresses, length in bytes."""
        assert self.ask(f"step {name}") == "stepped"
        turn, self._n_steps = self._n_steps, self._n_steps + 1
        if name == "write":
            pages = range(turn % 100, self.n_pages, 100)
            return [self.address + page * _PAGE for page in pages], _PAGE
        n = self.n_pages // 100
        first = turn * n % (self.n_pages - n + 1)
        return [self.address + first * _PAGE], n * _PAGE
