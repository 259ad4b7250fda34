"""A pid namespace in which a restored tree has its numbers, whatever they are for others.

    number    what the image says, and what the tree itself sees: 1233
    pid       what we see, and /proc where ckpt runs: 48211

The kernel takes and gives numbers as whoever makes the call sees them. So remote calls speak of
numbers; ptrace, /proc and kill of ours speak of pids. `seed.Embryo` holds both.

Where the root was pid 1 of its namespace, it is the first of the new one. Otherwise that has an
init of ours (`init`), and is there before the tree is. Then it can be entered for a while: what
we fork has a number in it, so a stand-in can have the one of a process of the tree.

Kernel: pid_namespaces(7), setns(2).
"""

import contextlib
from collections.abc import Iterator, Mapping

import attrs

from ckpt.kernel.namespaces import children_in
from ckpt.kernel.procfs.status import Status
from ckpt.units import Fd


@attrs.frozen(slots=True, repr=False)
class PidSpace:
    """Where the root is born."""

    fd: Fd | None
    """The namespace; None: it begins with the root."""

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have what this thread forks in the namespace, if it is there already.

        State:  no threads are started meanwhile: the kernel would refuse.
        """
        if self.fd is None:
            yield
            return
        with children_in(self.fd):
            yield


@attrs.frozen(slots=True, repr=False)
class Numbers:
    """What a tree calls those whom we see under other numbers: tasks, groups, sessions."""

    by_seen: Mapping[int, int]

    def of(self, seen: int) -> int:
        """Return a number as the tree knows it; 0, as the kernel has it, for who is not in it."""
        return self.by_seen.get(seen, 0)


def numbers_in(statuses: Iterator[tuple[Status, int, int]]) -> Numbers:
    """Return the numbers of tasks in the innermost pid namespace of each.

    Args:
        statuses: of each task, with its group and its session as we see them.
    """
    found: dict[int, int] = {}
    for status, group, session in statuses:
        found[status.pid] = status.ns_pid[-1]
        found[status.tgid] = status.ns_tgid[-1]
        found[group] = status.ns_pgid[-1]
        found[session] = status.ns_sid[-1]
    return Numbers(found)
