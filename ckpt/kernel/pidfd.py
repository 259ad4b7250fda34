"""pidfd: a process held by a descriptor, so that a number used again cannot fool us.

Source: pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2).
"""

import errno
from typing import Final

from ckpt.kernel.arch import NR
from ckpt.kernel.failures import failures_of
from ckpt.kernel.libc import syscall
from ckpt.units import Fd, Pid, RemoteFd, Tid

PIDFD_NONBLOCK: Final = 0o4000
PIDFD_THREAD: Final = 0o200
"""A flag of pidfd_open (6.9): the descriptor stands for one thread."""


def pidfd_open(pid: Pid | Tid, flags: int = 0) -> Fd:
    """Return a descriptor for the process (close-on-exec); readable once it has ended.

    For a thread that is not the first of its process it stands for that thread (6.9).

    Kernel: pidfd_open(2), 5.3.

    Raises:
        TargetGone: there is no such process (a zombie still is one).
        HostFull: no descriptors left.
        OSError: EINVAL, `pid` is a thread that leads no group, and the kernel is older.
    """
    with failures_of(pid, "open a pidfd"):
        try:
            return Fd(syscall(NR.pidfd_open, pid, flags))
        except OSError as error:
            # Before 6.15 EINVAL, then ENOENT.
            if error.errno not in (errno.EINVAL, errno.ENOENT) or flags & PIDFD_THREAD:
                raise
            return Fd(syscall(NR.pidfd_open, pid, flags | PIDFD_THREAD))


def pidfd_getfd(pidfd: int, target_fd: RemoteFd | int, *, pid: Pid) -> Fd:
    """Duplicate descriptor `target_fd` of the process into ours (close-on-exec).

    The copy shares the open file description: offset, flags and locks are the target's.

    Kernel: pidfd_getfd(2), 5.6.

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access to it is refused.
        HostFull: no descriptors left.
        OSError: EBADF, `target_fd` is not open there.
    """
    with failures_of(pid, "take a descriptor"):
        return Fd(syscall(NR.pidfd_getfd, pidfd, target_fd, 0))


def pidfd_send_signal(pidfd: int, signo: int, *, pid: Pid) -> None:
    """Send a signal to the process behind the descriptor; signal 0 only asks if it is there.

    Kernel: pidfd_send_signal(2), 5.1.

    Raises:
        TargetGone: the process ended and was waited for.
        NotPermitted: it is another user's.
    """
    with failures_of(pid, "signal"):
        syscall(NR.pidfd_send_signal, pidfd, signo, 0, 0)
