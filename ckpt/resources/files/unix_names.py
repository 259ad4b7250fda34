"""Names of unix sockets in the restorer: bound where a file was, and found again without a name.

The kernel keeps the name as it was given to bind(2): `./socket` of a directory that may not be the
process's any more, a path that has been deleted. So a socket is bound inside a new directory that
stands for the root or working directory, by a stand-in; then its file is moved to where it was, or
thrown away. A file that is there, of a socket that is dead, is replaced in one step.

Kernel: unix(7), SIOCUNIXFILE (4.12): a descriptor on the file, even if it is deleted.
"""

import contextlib
import fcntl
import os
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterator

from ckpt.process.stand_in import act
from ckpt.resources.files.unix_queue import to_name

_SIOCUNIXFILE = 0x89E0
_SCRATCH = "/tmp"


def bind(
    sock: Socket, name: bytes, path: str = "", mode: int = 0, uid: int = 0, gid: int = 0
) -> None:
    """Give a socket of ours a name.

    Args:
        sock: has none yet.
        name: a path as the process gave it, or a zero byte and an abstract name.
        path: where the file shall be in the end, absolute; empty: nowhere.
        mode: of the file.
        uid: owner of the file.
        gid: group of the file.

    Raises:
        OSError: EADDRINUSE, somebody has that abstract name; others: the file cannot be made.
    """
    if name[:1] == b"\0":
        sock.bind(name)
        return
    with _scratch_beside(path) as scratch:
        # As many levels as can be gone up.
        depth = name.split(b"/").count(b"..")
        inside = "" if name[:1] == b"/" else "/" + "d/" * depth
        for level in range(1, depth + 1):
            os.mkdir(os.path.join(scratch, *["d"] * level))
        act(lambda: _bind_there(sock, name), root=scratch, cwd=inside)
        made = os.path.normpath(os.path.join(inside or "/", os.fsdecode(name)))
        if path:
            made = scratch + made
            os.chown(made, uid, gid)
            os.chmod(made, mode)
            os.rename(made, path)


def _bind_there(sock: Socket, name: bytes) -> None:
    folder = os.path.dirname(name)
    if folder:
        os.makedirs(folder, exist_ok=True)
    sock.bind(name)


@contextlib.contextmanager
def _scratch_beside(path: str) -> Iterator[str]:
    """Make a directory on the file system of `path`; it is gone in the end."""
    scratch = os.path.join(os.path.dirname(path) or _SCRATCH, f".ckpt-{os.urandom(8).hex()}")
    os.mkdir(scratch, 0o700)
    try:
        yield scratch
    finally:
        for folder, _, files in os.walk(scratch, topdown=False):
            for file in files:
                os.unlink(os.path.join(folder, file))
            os.rmdir(folder)


@contextlib.contextmanager
def address_of(sock: Socket) -> Iterator[bytes]:
    """Lend an address by which a bound socket of ours can be called, whatever became of its file.

    Raises:
        OSError: it has no name.
    """
    name = to_name(sock.getsockname())
    if name[:1] == b"\0":
        yield name
        return
    fd = fcntl.ioctl(sock.fileno(), _SIOCUNIXFILE)
    try:
        yield b"/proc/self/fd/%d" % fd
    finally:
        os.close(fd)
