"""All resources that are known, in the order in which they are captured and restored.

Within one stage (`base.Stage`) the order is that of these lists: so what relies on something else
of its stage stands behind it. The engine walks them and knows no resource by name.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from ckpt.process.seed import ClockOffsets
from ckpt.resources import clocks, mounts, namespaces
from ckpt.resources.base import Resource
from ckpt.resources.cgroups import CGROUPS
from ckpt.resources.content import CONTENTS
from ckpt.resources.credentials import CREDENTIALS
from ckpt.resources.files.owners import FILE_OWNERS
from ckpt.resources.files.table import FILES
from ckpt.resources.filesystem import FILESYSTEM
from ckpt.resources.future_locks import FUTURE_LOCKS
from ckpt.resources.identity import IDENTITY, TASK_MODES
from ckpt.resources.keyrings import KEYRINGS
from ckpt.resources.labels import LABEL
from ckpt.resources.limits import LIMITS
from ckpt.resources.memory import MEMORY
from ckpt.resources.memory_policy import MAPPING_POLICIES, THREAD_POLICY
from ckpt.resources.mounts import beside as beside
from ckpt.resources.mounts import reachable as reachable
from ckpt.resources.mounts import reachable_instead as reachable_instead
from ckpt.resources.namespaces import NAMESPACES
from ckpt.resources.registers import REGISTERS
from ckpt.resources.scheduling import SCHEDULING
from ckpt.resources.seccomp import SECCOMP
from ckpt.resources.signals import SIGNALS, THREAD_SIGNALS
from ckpt.resources.sysv import SYSV
from ckpt.resources.terminal import FOREGROUND, TERMINAL
from ckpt.resources.threads import THREAD as THREAD_ITSELF
from ckpt.resources.timers import TIMERS

PROCESS: tuple[Resource[Any], ...] = (
    # Before there is any memory, which is charged to the group of the process.
    CGROUPS,
    MEMORY,
    SYSV,
    FILES,
    # Captured with what the descriptors were found to be.
    CONTENTS,
    FILESYSTEM,
    clocks.CLOCKS,
    NAMESPACES,
    LABEL,
    IDENTITY,
    TERMINAL,
    SIGNALS,
    # Names threads, which exist by then.
    FILE_OWNERS,
    FOREGROUND,
    # Behind the queued signals, which a lower limit of them could refuse.
    LIMITS,
    TIMERS,
    MAPPING_POLICIES,
    # Nothing is mapped for the process itself any more.
    FUTURE_LOCKS,
    # Before the credentials: without no_new_privs it takes privileges.
    SECCOMP,
)
"""What the threads of a process share; captured and restored on the leader."""

THREAD: tuple[Resource[Any], ...] = (
    THREAD_ITSELF,
    THREAD_SIGNALS,
    SCHEDULING,
    KEYRINGS,
    THREAD_POLICY,
    CREDENTIALS,
    # A change of ids clears two of these.
    TASK_MODES,
    # The last of all: the thread then is what it was, and only waits to be let go.
    REGISTERS,
)
"""What each thread has for itself."""


def highest_fd(processes: Iterable[Mapping[str, Any]]) -> int:
    """Return the highest descriptor number of some processes' resources, -1 if there is none."""
    return max((int(resources[FILES.name].highest_fd) for resources in processes), default=-1)


def external_keys(processes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what led outside the tree, by the names that a restore must be given."""
    keys = (key for resources in processes for key in resources[FILES.name].external_keys)
    return list(dict.fromkeys(keys))


def takes_terminal(resources: Mapping[str, Any]) -> bool:
    """Tell whether a process takes a controlling terminal, before its session has other members."""
    return bool(resources[TERMINAL.name].leads)


def clock_offsets(resources: Mapping[str, Any]) -> ClockOffsets | None:
    """Return what a new time namespace must add, so that the clocks go on; None: stay in ours."""
    record = resources.get(clocks.CLOCKS.name)
    return None if record is None else clocks.offsets_for(record)


def has_own_numbers(resources: Mapping[str, Any]) -> bool:
    """Tell whether a tree's numbers are those of a pid namespace of its own."""
    return bool(resources[NAMESPACES.name].pids)


def stays_in_ours(resources: Mapping[str, Any]) -> bool:
    """Tell whether `entered` would change nothing: the root has no namespaces of its own."""
    record = resources[NAMESPACES.name]
    return not (record.own or record.pids or record.mounts.own)


def entered(resources: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Have this thread, and all that it starts, in the namespaces that the root has of its own.

    Raises:
        NotPermitted: we may not make them.
        RestoreFailed: the kernel refused something else.
    """
    return namespaces.entered(resources[NAMESPACES.name])


def has_own_mounts(resources: Mapping[str, Any]) -> bool:
    """Tell whether a root has a mount namespace for itself."""
    return bool(resources[NAMESPACES.name].mounts.own)


def mounted(resources: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Have this thread, and all that it starts, in the mount namespace that the root has.

    Raises:
        HostMismatch: what is to be mounted is not there.
        NotPermitted: we may not make it.
        RestoreFailed: the kernel refused something else.
    """
    return mounts.mounted(resources[NAMESPACES.name].mounts)
