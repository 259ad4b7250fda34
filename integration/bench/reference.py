"""What the kernel and the processor ask for the single steps of a dump, done as lean as can be."""

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import zstandard

from ckpt.kernel import userfaultfd
from ckpt.units import AddrRange, Pid, RemoteAddr

_PAGE = mmap.PAGESIZE
_IOV_MAX = 1024
_PIECE = 4 << 20
_FRAME = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len_bytes", ctypes.c_size_t))


@contextlib.contextmanager
def _memory(n_bytes: int, *, touched: bool) -> Iterator[tuple[mmap.mmap, int]]:
    """Lend memory and its address."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (mmap.MAP_POPULATE if touched else 0)
    with mmap.mmap(-1, n_bytes, flags=flags) as buffer:
        first = ctypes.c_char.from_buffer(buffer)
        yield buffer, ctypes.addressof(first)
        del first  # a mapping that is pointed into cannot be closed


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def time_memcpy(n_bytes: int) -> float:
    """Return the s that memcpy takes from warm to warm memory."""
    with _memory(n_bytes, touched=True) as (_, source), _memory(n_bytes, touched=True) as (_, to):
        ctypes.memmove(to, source, n_bytes)
        return _timed(lambda: ctypes.memmove(to, source, n_bytes))


def time_readv(pid: int, starts: Sequence[int], len_bytes: int) -> float:
    """Return the ms that process_vm_readv takes for ranges of equal length into warm memory."""
    total = len(starts) * len_bytes
    remote = (_Iovec * len(starts))(*[(start, len_bytes) for start in starts])
    with _memory(total, touched=True) as (_, address):
        calls = []
        for first in range(0, len(starts), _IOV_MAX):
            n = min(_IOV_MAX, len(starts) - first)
            local = _Iovec(address + first * len_bytes, n * len_bytes)
            ranges = ctypes.byref(remote, first * ctypes.sizeof(_Iovec))
            calls.append((pid, ctypes.byref(local), 1, ranges, n, 0))
        started = time.perf_counter()
        moved = sum(_libc.process_vm_readv(*call) for call in calls)
        took_s = time.perf_counter() - started
    assert moved == total, f"read {moved} of {total} bytes"
    return took_s * 1e3


def time_vm_stream(pid: int, start: int, n_bytes: int) -> tuple[float, float]:
    """Return the s that much memory takes out of a process and back, by way of one warm buffer."""
    read_s = write_s = 0.0
    with _memory(_PIECE, touched=True) as (_, address):
        local = ctypes.byref(_Iovec(address, _PIECE))
        for at in range(start, start + n_bytes, _PIECE):
            there = ctypes.byref(_Iovec(at, _PIECE))
            read_s += _timed(lambda there=there: _move(_libc.process_vm_readv, pid, local, there))
            write_s += _timed(lambda there=there: _move(_libc.process_vm_writev, pid, local, there))
    return read_s, write_s


def _move(call: Callable[..., int], pid: int, local: object, there: object) -> None:
    moved = call(pid, local, 1, there, 1, 0)
    assert moved == _PIECE, f"moved {moved} of {_PIECE} bytes"


def time_fresh_memory(n_bytes: int) -> float:
    """Return the s that the kernel takes to hand out zeroed memory that was used just before."""

    def touch() -> None:
        with _memory(n_bytes, touched=True):
            pass

    touch()
    return _timed(touch)


def time_zstd(data: bytes, level: int) -> tuple[float, float]:
    """Return the s that one thread takes, and the compressed share."""
    frames = [data[at : at + _FRAME] for at in range(0, len(data), _FRAME)]
    compressor = zstandard.ZstdCompressor(level=level)
    started = time.perf_counter()
    n_out = sum(len(compressor.compress(frame)) for frame in frames)
    return time.perf_counter() - started, n_out / len(data)


def time_uffd_copy(n_bytes: int) -> float:
    """Return the s that one thread takes to fill our own missing pages by UFFDIO_COPY."""
    own = Pid(os.getpid())
    with (
        _memory(_PIECE, touched=True) as (_, source),
        _memory(n_bytes, touched=False) as (_, address),
    ):
        fd = userfaultfd.create()
        try:
            userfaultfd.negotiate(fd, userfaultfd.UffdFeature(0))
            span = AddrRange(RemoteAddr(address), RemoteAddr(address + n_bytes))
            userfaultfd.register(fd, span, userfaultfd.UFFDIO_REGISTER_MODE_MISSING, pid=own)
            started = time.perf_counter()
            for at in range(address, address + n_bytes, _PIECE):
                userfaultfd.copy(fd, RemoteAddr(at), source, _PIECE, pid=own)
            return time.perf_counter() - started
        finally:
            os.close(fd)


def time_write(path: Path, n_bytes: int, *, sync: bool) -> float:
    """Return the s that a new file of so many bytes takes (with `sync`: to be on the disk)."""
    piece = os.urandom(1 << 20)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for at in range(0, n_bytes, len(piece)):
            file.write(piece[: n_bytes - at])
        if sync:
            os.fsync(file.fileno())
    took_s = time.perf_counter() - started
    path.unlink()
    return took_s
