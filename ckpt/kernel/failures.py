"""Where an `OSError` becomes one of ours: once, here, with the errno kept as the cause.

Every function of `ckpt.kernel` that acts on a process wraps its system call in `failures_of`, so
the layers above never look at an errno to learn that their target is gone.
"""

import contextlib
import errno
from collections.abc import Iterator

from ckpt.errors import CkptError, FeatureMissing, HostFull, NotPermitted, TargetGone
from ckpt.units import Pid, Tid

_FULL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC})


def turn_failure(error: OSError, pid: Pid | Tid, action: str) -> CkptError | None:
    """Return what `error` means to a user, or None where only the caller can know.

    Args:
        error: from a system call on process or thread `pid`.
        pid: whom the call was about.
        action: what was attempted, as the end of "not permitted to ..." (the pid is added).
    """
    if error.errno == errno.ESRCH:
        return TargetGone(pid=pid)
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermitted(
            action=f"{action} of process {pid}",
            remedy="run ckpt as root, or as the owner of the process with CAP_SYS_PTRACE",
        )
    if error.errno == errno.ENOSYS:
        return FeatureMissing(
            feature=f"system call to {action}", remedy="use a newer or more complete kernel"
        )
    if error.errno in _FULL:
        return HostFull(
            what=f"could not {action} of process {pid} ({error.strerror})",
            remedy="free memory or descriptors and try again",
        )
    return None


@contextlib.contextmanager
def failures_of(pid: Pid | Tid, action: str) -> Iterator[None]:
    """Turn an `OSError` of the body by `turn_failure`; one without a turn passes as it is.

    Raises:
        TargetGone: ESRCH.
        NotPermitted: EPERM, EACCES.
        FeatureMissing: ENOSYS.
        HostFull: EMFILE, ENFILE, ENOMEM, ENOSPC.
        OSError: any other errno.
    """
    try:
        yield
    except OSError as error:
        turned = turn_failure(error, pid, action)
        if turned is None:
            raise
        raise turned from error


@contextlib.contextmanager
def proc_failures_of(pid: Pid | Tid, action: str) -> Iterator[None]:
    """Like `failures_of`, for files below /proc/PID: there ENOENT too means that it is gone.

    Raises:
        TargetGone: ESRCH, ENOENT.
        NotPermitted: EPERM, EACCES.
        FeatureMissing: ENOSYS.
        HostFull: EMFILE, ENFILE, ENOMEM, ENOSPC.
        OSError: any other errno.
    """
    with failures_of(pid, action):
        try:
            yield
        except FileNotFoundError as error:
            raise TargetGone(pid=pid) from error
