"""Another process's memory, in bulk: process_vm_readv/writev, and /proc/PID/mem for the rest.

`readv` and `writev` take thousands of ranges in a few system calls; nothing here runs once per
page. `read_mem` and `write_mem` have the same shapes and go through /proc/PID/mem, which ignores
protections (PROT_NONE, write-only; read-only private pages are copied on write), one system call
a range: for what the fast pair refuses. How much was moved is a result and not an error, for
pages may vanish while the target runs.
"""

import contextlib
import errno
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from ckpt.kernel.arch import NR
from ckpt.kernel.failures import failures_of, proc_failures_of
from ckpt.kernel.libc import readable_address, syscall, writable_address
from ckpt.units import AddrRange, Fd, Pid, Tid

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

IOV_MAX: Final = 1024
"""How many ranges one system call takes (UIO_MAXIOV, include/uapi/linux/uio.h)."""

_IOVEC_BYTES_MAX: Final = 1 << 20
# The kernel moves at most 2 GiB less a page in one call and says nothing. With 1024 iovecs of at
# most 1 MiB that cannot happen, so a short count always means a page that could not be reached.

Piece = tuple[int, int, int]
"""(address in the target, offset in our buffer, length), in bytes."""


def readv(pid: Pid | Tid, ranges: Sequence[AddrRange], into: "WriteableBuffer") -> int:
    """Read `ranges` of the target one after the other into the start of `into`.

    State:  any; the ranges are read at slightly different times while the target runs.
    Shape:  as many bytes as the ranges have together must fit into `into`.
    Kernel: process_vm_readv(2), batched by 1024 ranges.

    Returns:
        how many bytes were read. Fewer than asked: the page at that point is unmapped or may not
        be read, and nothing after it was tried; a range may end in its middle, at a page.

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access to it is refused.
        ValueError: `into` is too small.
    """
    address, size = writable_address(into)
    remote = _iovecs([(span.start, span.end - span.start) for span in ranges])
    wanted = sum(remote[1::2])
    if wanted > size:
        raise ValueError(f"{wanted} bytes do not fit into a buffer of {size}")
    done = 0
    with failures_of(pid, "read the memory"):
        for batch in _iter_calls(remote):
            n_bytes = sum(batch[1::2])
            local = array("Q", (address + done, n_bytes))
            moved = _move(NR.process_vm_readv, pid, local, batch)
            done += moved
            if moved < n_bytes:
                break
    return done


def writev(pid: Pid | Tid, pieces: Sequence[Piece], source: "ReadableBuffer") -> int:
    """Write scattered `pieces` of `source` to the target, in the order given.

    State:  any; best with the target stopped.
    Kernel: process_vm_writev(2), batched by 1024 pieces. Only memory that the target itself could
        write: for the rest use `write_mem`.

    Returns:
        how many bytes were written. Fewer than asked: the page at that point is unmapped or may
        not be written, and nothing after it was tried.

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access to it is refused.
        ValueError: a piece reaches beyond `source`.
    """
    address, size = readable_address(source)
    _check_pieces(pieces, size)
    remote = _iovecs([(addr, length) for addr, _, length in pieces])
    scattered = _iovecs([(address + offset, length) for _, offset, length in pieces])
    done = 0
    with failures_of(pid, "write the memory"):
        for batch, local in zip(_iter_calls(remote), _iter_calls(scattered), strict=True):
            n_bytes = sum(batch[1::2])
            moved = _move(NR.process_vm_writev, pid, local, batch)
            done += moved
            if moved < n_bytes:
                break
    return done


def read_mem(pid: Pid | Tid, ranges: Sequence[AddrRange], into: "WriteableBuffer") -> int:
    """Read like `readv`, but whatever the protection of the pages is.

    Kernel: /proc/PID/mem (proc_pid_mem(5)); one pread a range. Memory that no read can reach
        (unmapped, device memory, a guard region, a page beyond the end of its file) ends it.

    Returns:
        how many bytes were read, in order; see `readv`.

    Raises:
        TargetGone: the process ended before it was opened.
        NotPermitted: ptrace access to it is refused.
        ValueError: `into` is too small.
    """
    view = memoryview(into).cast("B")
    wanted = sum(span.end - span.start for span in ranges)
    if wanted > len(view):
        raise ValueError(f"{wanted} bytes do not fit into a buffer of {len(view)}")
    done = 0
    with _opened_mem(pid, os.O_RDONLY, "read the memory") as fd:
        for span in ranges:
            length = span.end - span.start
            target = view[done : done + length]
            moved = _fill(os.preadv, fd, target, span.start)
            done += moved
            if moved < length:
                break
    return done


def write_mem(pid: Pid | Tid, pieces: Sequence[Piece], source: "ReadableBuffer") -> int:
    """Write like `writev`, but whatever the protection of the pages is.

    Kernel: /proc/PID/mem; one pwrite a piece. A read-only page of a private mapping gets its own
        copy; one of a shared file mapping without write permission stays refused.

    Returns:
        how many bytes were written, in order; see `writev`.

    Raises:
        TargetGone: the process ended before it was opened.
        NotPermitted: ptrace access to it is refused.
        ValueError: a piece reaches beyond `source`.
    """
    view = memoryview(source).cast("B")
    _check_pieces(pieces, len(view))
    done = 0
    with _opened_mem(pid, os.O_RDWR, "write the memory") as fd:
        for addr, offset, length in pieces:
            data = view[offset : offset + length]
            moved = _fill(os.pwritev, fd, data, addr)
            done += moved
            if moved < length:
                break
    return done


@contextlib.contextmanager
def _opened_mem(pid: Pid | Tid, flags: int, action: str) -> Iterator[Fd]:
    with proc_failures_of(pid, action):
        fd = os.open(f"/proc/{pid}/mem", flags | os.O_CLOEXEC)
        try:
            yield Fd(fd)
        finally:
            os.close(fd)


def _fill(
    move: Callable[[int, Sequence[memoryview], int], int], fd: Fd, data: memoryview, addr: int
) -> int:
    """Call `move` until all of `data` has moved or it moves no more; return how much did."""
    done = 0
    while done < len(data):
        try:
            moved = move(fd, [data[done:]], addr + done)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EFAULT):
                break
            raise
        if moved == 0:
            break
        done += moved
    return done


def _move(nr: NR, pid: Pid | Tid, local: "array[int]", remote: "array[int]") -> int:
    """Make one process_vm call; EFAULT, the kernel's word for "not even the first page", is 0."""
    try:
        return syscall(
            nr,
            pid,
            local.buffer_info()[0],
            len(local) // 2,
            remote.buffer_info()[0],
            len(remote) // 2,
        )
    except OSError as error:
        if error.errno == errno.EFAULT:
            return 0
        raise


def _iovecs(parts: Sequence[tuple[int, int]]) -> "array[int]":
    """Lay (address, length) parts out as `struct iovec`s of at most `_IOVEC_BYTES_MAX` each."""
    flat = array("Q", [word for part in parts for word in part])
    if not flat or max(flat[1::2]) <= _IOVEC_BYTES_MAX:
        return flat
    cut = array("Q")
    for address, length in parts:
        for at in range(0, length, _IOVEC_BYTES_MAX):
            cut.extend((address + at, min(_IOVEC_BYTES_MAX, length - at)))
    return cut


def _iter_calls(iovecs: "array[int]") -> Iterator["array[int]"]:
    """Cut iovecs into what one call takes."""
    for at in range(0, len(iovecs), 2 * IOV_MAX):
        yield iovecs[at : at + 2 * IOV_MAX]


def _check_pieces(pieces: Sequence[Piece], size: int) -> None:
    for addr, offset, length in pieces:
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"the piece at {addr:x} reaches beyond a buffer of {size} bytes")
