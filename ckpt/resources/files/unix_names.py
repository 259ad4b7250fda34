"""Names of unix sockets in the restorer: bound where a file was, and found again without a name.

The kernel keeps the name as it was given to bind(2): `./socket` of a directory that may not be the
process's any more, a path that has been deleted. So a socket is bound inside a new directory that
stands for the root or working directory, by a stand-in. There its file waits until the tree is let
go (`NewName`): whoever has the name until then, the original of a tree that is moved above all, is
found by it. Then the file takes the place of the one that is there, in one step.

Kernel: unix(7), SIOCUNIXFILE (4.12): a descriptor on the file, even if it is deleted.
"""

import contextlib
import fcntl
import os
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterator

import attrs

from ckpt.process.stand_in import act
from ckpt.resources.files.unix_queue import to_name

_SIOCUNIXFILE = 0x89E0
_SCRATCH = "/tmp"


@attrs.define(slots=True, eq=False, repr=False)
class NewName:
    """The file of a bound socket, in a directory beside the place where it shall be."""

    made: str
    """Where it is; in the end it is at `path`."""
    path: str
    _scratch: str
    _old: str = ""
    """Another name of the file that it took the place of."""
    _appeared: os.stat_result | None = None

    def appear(self) -> None:
        """Put it where it shall be; `undo` can take that back until `clear`.

        Raises:
            OSError: the kernel refused.
        """
        old = self.made + ".old"
        # Nobody may be there; not all file systems have a second name for a file.
        with contextlib.suppress(OSError):
            os.link(self.path, old, follow_symlinks=False)
            self._old = old
        self._appeared = os.lstat(self.made)
        os.rename(self.made, self.path)

    def undo(self) -> None:
        """Give the name back to who had it, unless somebody else has taken it since.

        Raises nothing: whoever has taken the folder away has taken the name, too.
        """
        with contextlib.suppress(OSError):
            if self._appeared and os.path.samestat(os.lstat(self.path), self._appeared):
                if self._old:
                    os.rename(self._old, self.path)
                else:
                    os.unlink(self.path)

    def clear(self) -> None:
        """Remove the directory beside, with what is still in it."""
        _remove(self._scratch)


def bind(sock: Socket, name: bytes) -> None:
    """Give a socket of ours a name by which nobody finds it, but for abstract ones.

    Args:
        sock: has none yet.
        name: a path as the process gave it, or a zero byte and an abstract name.

    Raises:
        OSError: EADDRINUSE, somebody has that abstract name; others: the file cannot be made.
    """
    if name[:1] == b"\0":
        sock.bind(name)
        return
    scratch = _make_scratch(_SCRATCH)
    try:
        _bind_in(scratch, sock, name)
    finally:
        _remove(scratch)


def bind_beside(sock: Socket, name: bytes, path: str, mode: int, uid: int, gid: int) -> NewName:
    """Give a socket of ours a name whose file waits beside its place; to be cleared in any case.

    Args:
        sock: has none yet.
        name: a path as the process gave it.
        path: where the file shall be in the end, absolute.
        mode: of the file.
        uid: owner of the file.
        gid: group of the file.

    Raises:
        OSError: the file cannot be made; nothing is left of it.
    """
    scratch = _make_scratch(os.path.dirname(path))
    try:
        made = _bind_in(scratch, sock, name)
        os.chown(made, uid, gid)
        os.chmod(made, mode)
    except BaseException:
        _remove(scratch)
        raise
    return NewName(made, path, scratch)


def _make_scratch(folder: str) -> str:
    scratch = os.path.join(folder, f".ckpt-{os.urandom(8).hex()}")
    os.mkdir(scratch, 0o700)
    return scratch


def _remove(scratch: str) -> None:
    with contextlib.suppress(OSError):
        for folder, _, files in os.walk(scratch, topdown=False):
            for file in files:
                os.unlink(os.path.join(folder, file))
            os.rmdir(folder)


def _bind_in(scratch: str, sock: Socket, name: bytes) -> str:
    """Bind a socket as if a directory were the root; return where its file is."""
    # As many levels as can be gone up.
    depth = name.split(b"/").count(b"..")
    inside = "" if name[:1] == b"/" else "/" + "d/" * depth
    for level in range(1, depth + 1):
        os.mkdir(os.path.join(scratch, *["d"] * level))
    act(lambda: _bind_there(sock, name), root=scratch, cwd=inside)
    return scratch + os.path.normpath(os.path.join(inside or "/", os.fsdecode(name)))


def _bind_there(sock: Socket, name: bytes) -> None:
    folder = os.path.dirname(name)
    if folder:
        os.makedirs(folder, exist_ok=True)
    sock.bind(name)


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
