"""A userfaultfd over somebody else's address space.

It belongs to the address space of whoever makes it, so it is made *inside* by a remote call,
fetched with pidfd_getfd, and closed there: the process's own descriptors stay as they were. Who
uses it: the tracker that protects pages, and the filling of a restored process.
"""

import contextlib
import os
from collections.abc import Sequence

from ckpt.errors import CkptError, FeatureMissing
from ckpt.kernel import pidfd, userfaultfd
from ckpt.kernel.arch import NR
from ckpt.kernel.userfaultfd import UffdFeature
from ckpt.process.arena import Arena
from ckpt.process.keeper import opened_pidfd
from ckpt.process.remote import Reply, call
from ckpt.process.task import Task
from ckpt.process.together import Asked, expect_answer, try_on_all
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
    """Return what `make_inside_each` does, of one process."""
    (fd,) = make_inside_each(
        [(pid, arena, task)], features, user_faults_only=user_faults_only, remedy=remedy
    )
    return fd


def make_inside_each(
    wanted: Sequence[tuple[Pid, Arena, Task]],
    features: UffdFeature,
    *,
    user_faults_only: bool,
    remedy: str,
) -> list[Fd]:
    """Return descriptors of ours for new userfaultfds of stopped processes; the caller closes.

    Args:
        wanted: the processes, an arena in each, and a task of it that makes the calls; all do so
            at once.
        features: to be negotiated.
        user_faults_only: nobody will serve faults that the kernel makes for the process; needs no
            privilege then.
        remedy: for the error.

    Raises:
        FeatureMissing: the kernel refused one of the steps, in one of them.
        TargetGone: one of them has ended.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    if user_faults_only:
        flags |= userfaultfd.UFFD_USER_MODE_ONLY
    making = [Asked(arena, task, [call(NR.userfaultfd, flags)]) for _, arena, task in wanted]
    answers = try_on_all(making)
    closing = [
        Asked(asked.arena, asked.task, [call(NR.close, answer[0].value)])
        for asked, answer in zip(making, answers, strict=True)
        if not isinstance(answer, CkptError) and answer[0].ok
    ]
    with contextlib.ExitStack() as undo:
        try:
            made = [expect_answer(answer)[0] for answer in answers]
            fds = [
                _fetch(pid, reply, remedy, undo)
                for (pid, _, _), reply in zip(wanted, made, strict=True)
            ]
        finally:
            # Of one that has ended nothing need be closed.
            try_on_all(closing)
        for fd in fds:
            _negotiate(fd, features, remedy)
        undo.pop_all()
    return fds


def _fetch(pid: Pid, made: Reply, remedy: str, undo: contextlib.ExitStack) -> Fd:
    if not made.ok:
        raise FeatureMissing(f"userfaultfd for this process ({made})", remedy)
    with opened_pidfd(pid) as process:
        fd = pidfd.pidfd_getfd(process, RemoteFd(made.value), pid=pid)
    undo.callback(os.close, fd)
    return fd


def _negotiate(fd: Fd, features: UffdFeature, remedy: str) -> None:
    try:
        userfaultfd.negotiate(fd, features)
    except OSError as error:
        asked = ", ".join(str(one.name) for one in features).replace("_", " ").lower()
        raise FeatureMissing(f"userfaultfd with {asked}", remedy) from error
