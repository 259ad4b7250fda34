"""The keeper: holds a tracker's userfaultfd between two dumps.

A process of a few instructions that polls the target's pidfd and exits with it. It has two
descriptors, `PIDFD` and `USERFAULTFD`; the next dump takes the latter from it with pidfd_getfd. If
it is gone, tracking is gone, and the next dump is full and says so.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

from ckpt.errors import NotPermitted, TargetGone
from ckpt.kernel import pidfd
from ckpt.kernel.arch import x86_64 as arch
from ckpt.process.programs import spawn
from ckpt.process.tree import Identity, read_identity
from ckpt.units import Fd, Pid, RemoteFd

NAME = "ckpt-keeper"
PIDFD, USERFAULTFD = Fd(0), Fd(1)


@contextlib.contextmanager
def opened_pidfd(pid: Pid) -> Iterator[Fd]:
    """Lend a pidfd."""
    fd = pidfd.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def start_keeper(target: Pid, userfaultfd: Fd) -> Identity:
    """Start a keeper that holds `userfaultfd` for as long as `target` lives."""
    with opened_pidfd(target) as target_fd:
        pid = spawn(
            NAME,
            arch.POLL_CODE,
            {PIDFD: target_fd, USERFAULTFD: userfaultfd},
            survives=True,
        )
    return read_identity(pid)


def take_userfaultfd(keeper: Identity) -> Fd | None:
    """Return a descriptor of ours for what the keeper holds; None if it is not there any more."""
    try:
        if read_identity(keeper.pid) != keeper:
            return None
        with opened_pidfd(keeper.pid) as keeper_fd:
            return pidfd.pidfd_getfd(keeper_fd, RemoteFd(USERFAULTFD), pid=keeper.pid)
    except (TargetGone, NotPermitted, OSError):
        return None


def stop_keeper(keeper: Identity) -> None:
    """End a keeper that is no longer needed; nothing happens if it is gone."""
    with contextlib.suppress(TargetGone, ProcessLookupError):
        if read_identity(keeper.pid) == keeper:
            os.kill(keeper.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(keeper.pid, 0)
