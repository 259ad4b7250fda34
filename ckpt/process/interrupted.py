"""System calls that our stop interrupted: how each goes on as if nothing had been.

Most calls the kernel restarts by itself, if the task gets its registers back as they were. A few
(epoll_wait, sigtimedwait, ...) return EINTR after any stop: those we issue again.
"""

from ckpt.kernel.arch import x86_64 as arch
from ckpt.process.task import Task


def mend(task: Task) -> None:
    """Before a live task is let go: issue a call again that the kernel would end with EINTR."""
    if arch.needs_our_restart(task.registers):
        task.registers = arch.restarted(task.registers)
        task.disturbed = True
