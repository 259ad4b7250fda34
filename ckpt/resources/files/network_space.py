"""Sockets are looked at from the network namespace that their process is in.

What the kernel tells by number or by list (interfaces, groups, ports, rules of the firewall), it
tells of the namespace of who asks.

Kernel: setns(2), SIOCGSKNS (4.10; CAP_NET_ADMIN) for the namespace that a socket is of.
"""

import contextlib
import fcntl
import os
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterator

import attrs

from ckpt.kernel.namespaces import inside, read_namespace
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.resources.files.sockopts import borrow_socket
from ckpt.units import Pid

_SIOCGSKNS = 0x894C
_KIND_MASK = 0xF
_ELSEWHERE = Problem(
    "is a socket of another network namespace than its process, which is not supported yet"
)


_NATURES = "natures of sockets"
"""Key of `Tree.notes`: inode number -> `Nature`; no socket ever changes it."""


@attrs.frozen(slots=True)
class Nature:
    """What a socket was made as."""

    family: int
    kind: int
    """SOCK_STREAM ..."""
    protocol: int


def nature_of(file: OpenFile, table: FdTable) -> Nature:
    """Return what a socket was made as; asked once in a dump, for kinds to tell theirs."""
    known: dict[int, Nature] = table.tree.notes.setdefault(_NATURES, {})
    inode = file.status.st_ino
    if inode not in known:
        with borrow_socket(file, table) as sock:
            known[inode] = Nature(sock.family, sock.type & _KIND_MASK, sock.proto)
    return known[inode]


@contextlib.contextmanager
def beside(pid: Pid) -> Iterator[None]:
    """Be in the network namespace of a process for the length of the block.

    Raises:
        OSError: the process ended, or we may not (CAP_SYS_ADMIN).
    """
    if read_namespace(pid, "net") == read_namespace(Pid(os.getpid()), "net"):
        yield
        return
    with inside(pid, "net"):
        yield


@contextlib.contextmanager
def borrow_beside(file: OpenFile, table: FdTable) -> Iterator[Socket]:
    """Lend the target's own socket, in the namespace that its process is in."""
    with borrow_socket(file, table) as sock, beside(table.pid):
        yield sock


def problem(sock: Socket, table: FdTable) -> Problem | None:
    """Tell whether a socket is of another namespace than its process, where the kernel tells."""
    try:
        fd: int = fcntl.ioctl(sock.fileno(), _SIOCGSKNS)
    except OSError:
        return None
    try:
        own = os.fstat(fd)
    finally:
        os.close(fd)
    return None if os.path.samestat(own, os.stat(f"/proc/{table.pid}/ns/net")) else _ELSEWHERE
