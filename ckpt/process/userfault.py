"""A userfaultfd over somebody else's address space.

It belongs to the address space of whoever makes it, so it is made *inside* by a remote call,
fetched with pidfd_getfd, and closed there: the process's own descriptors stay as they were. Who
uses it: the tracker that protects pages, and the filling of a restored process.
"""

import contextlib
import os

from ckpt.errors import FeatureMissing
from ckpt.kernel import pidfd, userfaultfd
from ckpt.kernel.arch import NR
from ckpt.kernel.userfaultfd import UffdFeature
from ckpt.process.arena import Arena
from ckpt.process.keeper import opened_pidfd
from ckpt.process.remote import call
from ckpt.process.task import Task
from ckpt.units import Fd, Pid, RemoteFd


def make_inside(
    pid: Pid,
    arena: Arena,
    task: Task,
    features: UffdFeature,
    *,
    user_faults_only: bool,
    remedy: str,
) -> Fd:
    """Return a descriptor of ours for a new userfaultfd of the stopped process; the caller closes.

    Args:
        pid: the process.
        arena: in it.
        task: of it, that makes the calls.
        features: to be negotiated.
        user_faults_only: nobody will serve faults that the kernel makes for the process; needs no
            privilege then.
        remedy: for the error.

    Raises:
        FeatureMissing: the kernel refused one of the steps.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    if user_faults_only:
        flags |= userfaultfd.UFFD_USER_MODE_ONLY
    (made,) = arena.run(task, [call(NR.userfaultfd, flags)])
    if not made.ok:
        raise FeatureMissing(f"userfaultfd for this process ({made})", remedy)
    with contextlib.ExitStack() as undo:
        try:
            with opened_pidfd(pid) as process:
                fd = pidfd.pidfd_getfd(process, RemoteFd(made.value), pid=pid)
            undo.callback(os.close, fd)
        finally:
            arena.run(task, [call(NR.close, made.value)])
        try:
            userfaultfd.negotiate(fd, features)
        except OSError as error:
            asked = ", ".join(str(one.name) for one in features).replace("_", " ").lower()
            raise FeatureMissing(f"userfaultfd with {asked}", remedy) from error
        undo.pop_all()
    return fd
