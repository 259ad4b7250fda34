"""Clearing the soft-dirty bits of an address space, the first half of soft-dirty tracking.

The second half is reading them (`ckpt.kernel.pagemap`). Kernels without CONFIG_MEM_SOFT_DIRTY
accept the write and do nothing: `ckpt.kernel.features` finds out by trying.
"""

import os
from typing import Final

from ckpt.kernel.failures import proc_failures_of
from ckpt.units import Pid

CLEAR_SOFT_DIRTY: Final = b"4"
"""Clear soft-dirty and write-protect every page (fs/proc/task_mmu.c)."""


def clear_soft_dirty(pid: Pid) -> None:
    """Clear the soft-dirty bit of every page of the process, and of its mappings.

    State:  frozen: reading and clearing are two steps, and a write between them would be lost.
    Kernel: write "4" to /proc/PID/clear_refs (Documentation/admin-guide/mm/soft-dirty.rst).

    Raises:
        TargetGone: the process ended.
        NotPermitted: the file belongs to another user.
    """
    with proc_failures_of(pid, "clear the soft-dirty bits"):
        fd = os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, CLEAR_SOFT_DIRTY)
        finally:
            os.close(fd)
