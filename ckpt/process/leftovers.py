"""Arenas that a killed ckpt has left in a process: found, and removed by the next one.

One is known by its size, its protection and the code at its start, which nobody else has. One that
had no code yet when ckpt was killed looks like anybody's memory; it stays. So does one in a process
that may not have memory to write and to run (PR_SET_MDWE), and one of a ckpt that had other code.
"""

import contextlib
from collections.abc import Iterable, Sequence

from ckpt.errors import TargetGone
from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.procfs import maps
from ckpt.process import memory
from ckpt.process.arena import ARENA_SIZE, arenas
from ckpt.process.freezer import Frozen
from ckpt.process.remote import call
from ckpt.units import AddrRange, Pid

_PERMS = "rwxp"


def find_leftovers(pid: Pid, lines: Iterable[str] | None = None) -> list[AddrRange]:
    """Return where arenas are in a process in which nobody has one.

    Args:
        pid: the process; it may be running.
        lines: of its /proc/PID/maps; None: read them.
    """
    found = []
    with contextlib.suppress(TargetGone):
        lines = maps.read_lines(pid) if lines is None else lines
        for vma in maps.parse_lines(line for line in lines if _PERMS in line):
            if _has_the_looks(vma) and _has_the_code(pid, vma.span):
                found.append(vma.span)
    return found


def _has_the_looks(vma: maps.Vma) -> bool:
    is_anonymous = not vma.is_file and vma.path is None
    return vma.perms == _PERMS and is_anonymous and vma.span.len_bytes == ARENA_SIZE


def _has_the_code(pid: Pid, span: AddrRange) -> bool:
    return memory.read(pid, span.start, len(arch.BATCH_CODE)) == arch.BATCH_CODE


def remove_leftovers(processes: Sequence[Frozen]) -> None:
    """Unmap all that is found in these stopped processes, of which no two share memory.

    One in which a thread still runs what the killed ckpt has asked for stays.

    Raises:
        HostFull, TargetGone: see `arenas`.
    """
    found = {one.pid: _find_unused(one) for one in processes}
    each = [one for one in processes if found[one.pid]]
    with arenas([(one.pid, one.tgid, one.leader) for one in each]) as lent:
        for one, arena in zip(each, lent, strict=True):
            spans = found[one.pid]
            arena.run(one.leader, [call(NR.munmap, span.start, ARENA_SIZE) for span in spans])


def _find_unused(frozen: Frozen) -> list[AddrRange]:
    running_at = [int(task.registers.rip) for task in frozen.tasks.values()]
    spans = find_leftovers(frozen.pid, frozen.leader.maps_lines)
    return [span for span in spans if not any(at in span for at in running_at)]
