"""userfaultfd: the ioctls of a descriptor that watches the faults of one address space.

The descriptor belongs to the address space of whoever made it, whoever holds it now; `pid` in
these functions names that process, for the errors. The tracker uses asynchronous write-protection
(no handler: the kernel resolves the fault and `ckpt.kernel.pagemap` tells which pages it was).

Source: include/uapi/linux/userfaultfd.h, userfaultfd(2), ioctl_userfaultfd(2).
"""

import contextlib
import ctypes
import enum
import errno
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import attrs

from ckpt.kernel import ioctl
from ckpt.kernel.arch import NR
from ckpt.kernel.burst import BurstWithRoom
from ckpt.kernel.failures import failures_of
from ckpt.kernel.libc import PAGE_SIZE, syscall
from ckpt.units import AddrRange, Fd, Pid, RemoteAddr

UFFD_API: Final = 0xAA
UFFD_USER_MODE_ONLY: Final = 1
"""A flag of userfaultfd(2) (5.11): no privilege needed, and faults made by the kernel itself end
in SIGBUS; not so with asynchronous write-protection, which has no handler to wait for."""


class UffdFeature(enum.IntFlag):
    """UFFD_FEATURE_*: what `negotiate` asks for; the kernel they came with is beside each."""

    PAGEFAULT_FLAG_WP = 1 << 0  # 5.7
    EVENT_FORK = 1 << 1  # 4.11
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7  # 4.14
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9  # 5.13
    MINOR_SHMEM = 1 << 10  # 5.14
    EXACT_ADDRESS = 1 << 11  # 5.18
    WP_HUGETLBFS_SHMEM = 1 << 12  # 5.19
    WP_UNPOPULATED = 1 << 13  # 6.4
    POISON = 1 << 14  # 6.6
    WP_ASYNC = 1 << 15  # 6.7
    MOVE = 1 << 16  # 6.8


UFFDIO_REGISTER_MODE_MISSING: Final = 1 << 0
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1
UFFDIO_REGISTER_MODE_MINOR: Final = 1 << 2

UFFDIO_WRITEPROTECT_MODE_WP: Final = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE: Final = 1 << 1

UFFDIO_COPY_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_COPY_MODE_WP: Final = 1 << 1

UFFDIO_ZEROPAGE_MODE_DONTWAKE: Final = 1 << 0


UFFD_EVENT_PAGEFAULT: Final = 0x12
UFFD_EVENT_FORK: Final = 0x13
UFFD_EVENT_REMAP: Final = 0x14
UFFD_EVENT_REMOVE: Final = 0x15
UFFD_EVENT_UNMAP: Final = 0x16


class uffdio_api(ctypes.Structure):  # noqa: N801
    """`struct uffdio_api`."""

    features: int
    ioctls: int
    _fields_ = (
        ("api", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


class uffdio_range(ctypes.Structure):  # noqa: N801
    """`struct uffdio_range`: start and length in bytes, page aligned."""

    _fields_ = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


class uffdio_register(ctypes.Structure):  # noqa: N801
    """`struct uffdio_register`."""

    ioctls: int
    _fields_ = (
        ("range", uffdio_range),
        ("mode", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


class uffdio_copy(ctypes.Structure):  # noqa: N801
    """`struct uffdio_copy`."""

    copy: int
    _fields_ = (
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copy", ctypes.c_int64),
    )


class uffdio_zeropage(ctypes.Structure):  # noqa: N801
    """`struct uffdio_zeropage`."""

    zeropage: int
    _fields_ = (
        ("range", uffdio_range),
        ("mode", ctypes.c_uint64),
        ("zeropage", ctypes.c_int64),
    )


class uffdio_writeprotect(ctypes.Structure):  # noqa: N801
    """`struct uffdio_writeprotect`."""

    _fields_ = (("range", uffdio_range), ("mode", ctypes.c_uint64))


_MESSAGE: Final = struct.Struct("=B7x3Q")
"""`struct uffd_msg`; its union as three words, of which each event has its own meaning."""
_MESSAGES_AT_ONCE: Final = 64

_UNMAPPED: Final = (1 << 47) - 2 * PAGE_SIZE
# The last page of the address space, where the kernel never maps anything by itself.

UFFDIO_API: Final = ioctl.iowr(UFFD_API, 0x3F, uffdio_api)
UFFDIO_REGISTER: Final = ioctl.iowr(UFFD_API, 0x00, uffdio_register)
UFFDIO_UNREGISTER: Final = ioctl.ior(UFFD_API, 0x01, uffdio_range)
UFFDIO_WAKE: Final = ioctl.ior(UFFD_API, 0x02, uffdio_range)
UFFDIO_COPY: Final = ioctl.iowr(UFFD_API, 0x03, uffdio_copy)
UFFDIO_ZEROPAGE: Final = ioctl.iowr(UFFD_API, 0x04, uffdio_zeropage)
UFFDIO_WRITEPROTECT: Final = ioctl.iowr(UFFD_API, 0x06, uffdio_writeprotect)


def create(flags: int = os.O_CLOEXEC | os.O_NONBLOCK) -> Fd:
    """Make a userfaultfd over *our own* address space; the caller closes it.

    Args:
        flags: O_CLOEXEC, O_NONBLOCK, UFFD_USER_MODE_ONLY.

    Raises:
        OSError: EPERM, not privileged and no UFFD_USER_MODE_ONLY; ENOSYS, not in this kernel.
    """
    return Fd(syscall(NR.userfaultfd, flags))


def negotiate(fd: int, features: UffdFeature) -> UffdFeature:
    """Do the UFFDIO_API handshake, once, and return all features that the kernel offers.

    Raises:
        OSError: EINVAL, a feature that this kernel lacks, or the handshake was done before;
            EPERM, EVENT_FORK without CAP_SYS_PTRACE.
    """
    arg = uffdio_api(api=UFFD_API, features=int(features))
    ioctl.call(fd, UFFDIO_API, arg)
    return UffdFeature(arg.features)


def register(fd: int, span: AddrRange, mode: int, *, pid: Pid) -> int:
    """Watch the mappings of `span`; return the bit mask (1 << nr) of ioctls that work there.

    Every mapping in the span must be of a kind that can be watched; a hole in the middle is fine,
    one that covers it all is not.

    Args:
        fd: the userfaultfd.
        span: page aligned.
        mode: UFFDIO_REGISTER_MODE_ bits.
        pid: whose address space it is.

    Raises:
        TargetGone: the address space is gone (the process ended, or called exec).
        NotPermitted: a shared mapping of a file that the target may not write.
        OSError: EINVAL, nothing mapped or a mapping that cannot be watched; EBUSY, another
            userfaultfd watches it already.
    """
    arg = uffdio_register(range=_range(span), mode=mode)
    with failures_of(pid, "watch the memory"), _gone_by_enomem(fd):
        ioctl.call(fd, UFFDIO_REGISTER, arg)
    return arg.ioctls


def try_register_each(fd: int, spans: Sequence[AddrRange], mode: int) -> list[bool]:
    """Do what `register` does for many spans in one go; tell of each whether it was done.

    Why one was not done, `register` says.
    """
    arguments = [bytes(uffdio_register(range=_range(span), mode=mode)) for span in spans]
    return _try_each(fd, UFFDIO_REGISTER, arguments)


def _try_each(fd: int, request: int, arguments: Iterable[bytes]) -> list[bool]:
    burst = BurstWithRoom()
    for argument in arguments:
        memory, at, address = burst.take(len(argument))
        memory[at : at + len(argument)] = argument
        burst.add(NR.ioctl, fd, request, address)
    return [result == 0 for result in burst.run()]


def unregister(fd: int, span: AddrRange, *, pid: Pid) -> None:
    """Stop watching `span`; write-protection made through the descriptor is undone there.

    Raises:
        TargetGone: the address space is gone.
        HostFull: no memory to split a mapping.
        OSError: EINVAL, a mapping in the span that could not have been watched.
    """
    with failures_of(pid, "stop watching the memory"), _gone_by_enomem(fd):
        ioctl.call(fd, UFFDIO_UNREGISTER, _range(span))


@contextlib.contextmanager
def _gone_by_enomem(fd: int) -> Iterator[None]:
    """Tell the two meanings of ENOMEM apart: (un)registering also says it where ESRCH is meant.

    UFFDIO_ZEROPAGE says ESRCH; on a page that nothing maps it does nothing but answer.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        probe = uffdio_zeropage(range=uffdio_range(start=_UNMAPPED, len=PAGE_SIZE))
        with contextlib.suppress(FileNotFoundError, BlockingIOError, FileExistsError):
            ioctl.call(fd, UFFDIO_ZEROPAGE, probe)
        raise


def write_protect(fd: int, span: AddrRange, mode: int, *, pid: Pid) -> None:
    """Set (UFFDIO_WRITEPROTECT_MODE_WP) or lift (0) write-protection of `span`.

    Raises:
        TargetGone: the address space is gone.
        OSError: ENOENT, a part of the span is not registered for write-protection; EAGAIN, the
            target is just changing its mappings: try again.
    """
    arg = uffdio_writeprotect(range=_range(span), mode=mode)
    with failures_of(pid, "write-protect the memory"):
        ioctl.call(fd, UFFDIO_WRITEPROTECT, arg)


def try_write_protect_each(fd: int, spans: Sequence[AddrRange], mode: int) -> list[bool]:
    """Do what `write_protect` does for many spans in one go; tell of each whether it was done.

    Why one was not done, `write_protect` says.
    """
    arguments = [bytes(uffdio_writeprotect(range=_range(span), mode=mode)) for span in spans]
    return _try_each(fd, UFFDIO_WRITEPROTECT, arguments)


def copy(fd: int, to: RemoteAddr, from_: int, len_bytes: int, mode: int = 0, *, pid: Pid) -> int:
    """Put pages in place, atomically for each page, and wake who waits for them.

    Args:
        fd: the userfaultfd.
        to: page aligned address in the watched space.
        from_: address in the space of the *caller*.
        len_bytes: multiple of the page size.
        mode: UFFDIO_COPY_MODE_ bits.
        pid: whose address space it is.

    Returns:
        how many bytes were put in place; fewer than asked if a page of the middle was there
        already, or the target is just changing its mappings.

    Raises:
        TargetGone: the address space is gone.
        FileExistsError: the first page is there already.
        OSError: ENOENT, not registered.
    """
    arg = uffdio_copy(dst=to, src=from_, len=len_bytes, mode=mode)
    with failures_of(pid, "fill the memory"):
        try:
            ioctl.call(fd, UFFDIO_COPY, arg)
        except BlockingIOError:
            # EAGAIN is how a partial copy is reported; `copy` says how far it came.
            return max(arg.copy, 0)
    return arg.copy


def zeropage(fd: int, span: AddrRange, mode: int = 0, *, pid: Pid) -> int:
    """Put the zero page in place all over `span`; return how many bytes, see `copy`.

    Raises:
        TargetGone: the address space is gone.
        FileExistsError: the first page is there already.
        OSError: ENOENT, not registered; EINVAL, not private anonymous memory.
    """
    arg = uffdio_zeropage(range=_range(span), mode=mode)
    with failures_of(pid, "fill the memory"):
        try:
            ioctl.call(fd, UFFDIO_ZEROPAGE, arg)
        except BlockingIOError:
            return max(arg.zeropage, 0)
    return arg.zeropage


def wake(fd: int, span: AddrRange, *, pid: Pid) -> None:
    """Wake the tasks that wait for a fault in `span` to be resolved.

    Raises:
        TargetGone: the address space is gone.
    """
    with failures_of(pid, "wake the faults"):
        ioctl.call(fd, UFFDIO_WAKE, _range(span))


def has_memory(fd: int) -> bool:
    """Tell whether the address space of the descriptor still exists."""
    probe = uffdio_zeropage(range=uffdio_range(start=_UNMAPPED, len=PAGE_SIZE))
    try:
        ioctl.call(fd, UFFDIO_ZEROPAGE, probe)
    except ProcessLookupError:
        return False
    except OSError:
        # ENOENT, nothing is mapped there; EAGAIN: the mappings are just changing.
        return True
    return True


@attrs.frozen(slots=True, repr=False)
class Fault:
    """Somebody waits for the page at `address`."""

    address: int


@attrs.frozen(slots=True, repr=False)
class Forked:
    """The process has forked; `fd` is a new descriptor of ours, for the child's memory."""

    fd: Fd


@attrs.frozen(slots=True, repr=False)
class Moved:
    """mremap has moved `len_bytes` from `start` to `to`."""

    start: int
    to: int
    len_bytes: int


@attrs.frozen(slots=True, repr=False)
class Dropped:
    """The pages of a range are gone: unmapped, or given back (MADV_DONTNEED)."""

    start: int
    end: int


Message = Fault | Forked | Moved | Dropped


def read_messages(fd: int) -> list[Message]:
    """Return what has happened, in its order but for faults, which may come early.

    A change of mappings lets the process go on when it is read here. Until then each `copy` and
    `zeropage` does nothing (they return 0).

    Raises:
        OSError: whatever read(2) says, but for EAGAIN.
    """
    try:
        raw = os.read(fd, _MESSAGES_AT_ONCE * _MESSAGE.size)
    except BlockingIOError:
        return []
    return [_message(*words) for words in _MESSAGE.iter_unpack(raw)]


def _message(event: int, first: int, second: int, third: int) -> Message:
    if event == UFFD_EVENT_FORK:
        return Forked(Fd(first & 0xFFFF_FFFF))
    if event == UFFD_EVENT_REMAP:
        return Moved(first, second, third)
    if event in (UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP):
        return Dropped(first, second)
    # A page fault: flags, then the address.
    return Fault(second)


def _range(span: AddrRange) -> uffdio_range:
    return uffdio_range(start=span.start, len=span.end - span.start)
