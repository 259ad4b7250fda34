"""Opens /dev/tty for a pseudo-terminal that controls nobody's session yet.

/dev/tty is the terminal of whoever opens it. So a child of ours becomes the leader of a session,
takes the terminal, opens it by that name, and we take the descriptor from there. When the child
ends, the session and its hold on the terminal end, too; only the child is in its foreground.

Kernel: tty(4), ioctl_tty(2) TIOCSCTTY, pidfd_getfd(2).
"""

import fcntl
import os
import struct

from ckpt.kernel import tty
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.units import Fd, Pid, RemoteFd

_ANSWER = struct.Struct("<i")


def open_as_leader(master: Fd, flags: int) -> Fd:
    """Return a description of the slave that was opened as /dev/tty with these flags.

    Raises:
        OSError: it cannot be opened so.
    """
    answers, answer = os.pipe2(os.O_CLOEXEC)
    end, ends = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        # Or our own copy of its end would keep it from being told.
        os.close(ends)
        _be_leader(master, flags, answer, end)
    try:
        os.close(answer)
        told = os.read(answers, _ANSWER.size)
        number = _ANSWER.unpack(told)[0] if told else -_EIO
        if number < 0:
            raise OSError(-number, os.strerror(-number))
        return _fetch(Pid(child), RemoteFd(number))
    finally:
        for fd in (answers, end, ends):
            os.close(fd)
        os.waitpid(child, 0)


_EIO = 5


def _be_leader(master: Fd, flags: int, answer: int, end: int) -> None:
    """Open it, say under which number, and stay until that was taken; in the child."""
    try:
        os.setsid()
        fcntl.ioctl(tty.open_peer(master, os.O_RDWR), tty.TIOCSCTTY, 0)
        os.write(answer, _ANSWER.pack(os.open("/dev/tty", flags)))
        os.read(end, 1)
    except OSError as error:
        os.write(answer, _ANSWER.pack(-(error.errno or _EIO)))
    finally:
        os._exit(0)


def _fetch(child: Pid, number: RemoteFd) -> Fd:
    pidfd = pidfd_open(child)
    try:
        return pidfd_getfd(pidfd, number, pid=child)
    finally:
        os.close(pidfd)
