"""Whether memory that a process will map is locked from the start (mlockall(2), MCL_FUTURE).

Which mappings are locked, `memory.py` captures by their flags. The kernel shows the wish for the
future nowhere: but the arena is a mapping that was made after it. If the sum of locked memory has
grown by that, there is the wish, and the arena's own flags tell whether pages are to be locked only
when they are touched.

Kernel: mlockall(2), `VmLck` of /proc/PID/status, VmFlags of /proc/PID/smaps.
"""

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.procfs import maps
from ckpt.kernel.procfs.files import read_bytes
from ckpt.kernel.procfs.status import parse_locked_bytes
from ckpt.process.clones import Common
from ckpt.process.remote import call
from ckpt.resources.base import Capture, Rebuilt, Resource, Restore, Stage, Stopped, expect

_MCL_FUTURE, _MCL_ONFAULT = 2, 4


@attrs.frozen(slots=True, repr=False)
class FutureLocksRecord:
    """What happens to memory that is mapped from now on."""

    locked: bool
    on_fault: bool
    """Pages are locked when they are touched, not before."""


def capture(stopped: Stopped) -> Capture[FutureLocksRecord]:
    """Compare what is locked now, with an arena, with what was before it."""
    before = stopped.read_status().vm_locked_bytes
    lines = stopped.task.maps_lines
    # Until a call has been made there need not be an arena.
    yield [call(NR.getpid)]
    if parse_locked_bytes(read_bytes(stopped.pid, "status")) <= before:
        return FutureLocksRecord(locked=False, on_fault=False)
    known = set(lines)
    new = [vma for line, vma in maps.read_smaps_by_line(stopped.pid).items() if line not in known]
    return FutureLocksRecord(locked=True, on_fault=any("lf" in vma.flags for vma in new))


def restore(record: FutureLocksRecord, _rebuilt: Rebuilt) -> Restore:
    """Wish it again; what is mapped by then is as it was."""
    if record.locked:
        flags = _MCL_FUTURE | (_MCL_ONFAULT if record.on_fault else 0)
        expect("locking future memory", (yield [call(NR.mlockall, flags)]))


FUTURE_LOCKS = Resource(
    "future_locks",
    FutureLocksRecord,
    Stage.LATE,
    capture=capture,
    restore=restore,
    common=Common.MEMORY,
)
