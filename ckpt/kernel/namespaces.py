"""Namespaces of this thread: enter another one for a while, or a new one, and what is set there.

The namespaces that can be entered here are those of a thread for itself: names of the host, System
V and POSIX IPC, network. The others are of a whole process, or of its children.

Source: namespaces(7), setns(2), unshare(2), netdevice(7), include/uapi/linux/sched.h.
"""

import contextlib
import enum
import fcntl
import os
import struct
from _socket import AF_INET, SOCK_DGRAM
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterator

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address, syscall
from ckpt.units import Fd, Pid, Tid


class Namespace(enum.IntFlag):
    """CLONE_NEW*, of the namespaces that a thread can have for itself."""

    NONE = 0
    CGROUP = 0x0200_0000
    UTS = 0x0400_0000
    IPC = 0x0800_0000
    NET = 0x4000_0000


_NEWPID = 0x2000_0000
"""CLONE_NEWPID."""

BY_NAME = {"uts": Namespace.UTS, "ipc": Namespace.IPC, "net": Namespace.NET}
"""By the names that they have below /proc/PID/ns."""

_ENTERED = BY_NAME | {"cgroup": Namespace.CGROUP}
"""And that of control groups, which changes nothing but how their paths are shown."""

_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFREQ = struct.Struct("<16sH22x")
_IFF_UP = 0x1
_LOOPBACK = b"lo"


def read_namespace(pid: Pid | Tid, name: str) -> str:
    """Return what tells one namespace from another (`uts:[4026531838]`).

    Raises:
        OSError: the task ended, or this kernel has no such namespaces.
    """
    return os.readlink(f"/proc/{pid}/ns/{name}")


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def staying(names: tuple[str, ...]) -> Iterator[None]:
    """Bring this thread back into the namespaces that it is in, whatever the block enters.

    Raises:
        OSError: the way back is barred (CAP_SYS_ADMIN was given up).
    """
    with contextlib.ExitStack() as stack:
        back = {}
        for name in names:
            back[name] = _open(f"/proc/thread-self/ns/{name}")
            stack.callback(os.close, back[name])
        try:
            yield
        finally:
            for name, fd in back.items():
                syscall(NR.setns, fd, _ENTERED[name])


@contextlib.contextmanager
def inside(pid: Pid, *names: str) -> Iterator[None]:
    """Have this thread in namespaces of a process for the length of the block.

    Raises:
        OSError: the process ended, or we may not (CAP_SYS_ADMIN).
    """
    with staying(names):
        for name in names:
            fd = _open(f"/proc/{pid}/ns/{name}")
            try:
                syscall(NR.setns, fd, _ENTERED[name])
            finally:
                os.close(fd)
        yield


@contextlib.contextmanager
def made_anew(names: tuple[str, ...]) -> Iterator[None]:
    """Have this thread, and what it forks, in new namespaces for the length of the block.

    Raises:
        OSError: the kernel has no room for them, or we may not (CAP_SYS_ADMIN).
    """
    with staying(names):
        flags = Namespace.NONE
        for name in names:
            flags |= BY_NAME[name]
        syscall(NR.unshare, flags)
        yield


@contextlib.contextmanager
def children_in(space: Fd) -> Iterator[None]:
    """Have what this thread forks, but not itself, in a pid namespace for the length of the block.

    Raises:
        OSError: the namespace has lost its first process, or we may not (CAP_SYS_ADMIN).
    """
    back = _open("/proc/thread-self/ns/pid_for_children")
    try:
        syscall(NR.setns, space, _NEWPID)
        try:
            yield
        finally:
            syscall(NR.setns, back, _NEWPID)
    finally:
        os.close(back)


def set_domainname(name: bytes) -> None:
    """Set the NIS domain name of the namespace of this thread: setdomainname(2)."""
    address, length = readable_address(name) if name else (0, 0)
    syscall(NR.setdomainname, address, length)


def is_loopback_up() -> bool:
    """Tell whether the loopback interface of this thread's network namespace is up."""
    return bool(_loopback_flags() & _IFF_UP)


def set_loopback_up() -> None:
    """Bring the loopback interface of this thread's network namespace up."""
    flags = _loopback_flags() | _IFF_UP
    with contextlib.closing(Socket(AF_INET, SOCK_DGRAM)) as asking:
        fcntl.ioctl(asking, _SIOCSIFFLAGS, _IFREQ.pack(_LOOPBACK, flags))


def _loopback_flags() -> int:
    with contextlib.closing(Socket(AF_INET, SOCK_DGRAM)) as asking:
        answer = fcntl.ioctl(asking, _SIOCGIFFLAGS, _IFREQ.pack(_LOOPBACK, 0))
    return int(_IFREQ.unpack(answer)[1])
