"""The label that a security module (SELinux, AppArmor, Smack) has given to a process.

Kernel: /proc/PID/attr/current (Documentation/admin-guide/LSM/index.rst); EINVAL where no module has
labels.

A restored process has the label of the restorer. So another one is refused before anything is
started; `unconfined` is as good as none. Refused before the target is stopped: threads with a
label of their own (a hat of AppArmor).
"""

import os
from collections.abc import Iterator

import attrs

from ckpt.errors import CkptError, Finding
from ckpt.kernel.features import Features
from ckpt.kernel.procfs import files as procfs_files
from ckpt.resources.base import Capture, Rebuilt, Resource, Restore, Stage, Stopped, Target
from ckpt.units import Pid, Tid

_FREE = "unconfined"


@attrs.frozen(slots=True, repr=False)
class LabelRecord:
    """The label of a process; empty where there is none."""

    label: str


def _read(pid: Pid | Tid, name: str = "attr/current") -> str:
    try:
        label = procfs_files.read_text(pid, name).strip("\0\n")
    except (CkptError, OSError):
        # No module of this kernel has labels, or the task ended.
        return ""
    return "" if label == _FREE else label


def look(target: Target) -> Iterator[Finding]:
    """Name threads that have another label than their process."""
    own = _read(target.pid)
    if not own:
        return
    for tid in procfs_files.list_tids(target.pid):
        theirs = _read(target.pid, f"task/{tid}/attr/current")
        if theirs and theirs != own:
            yield Finding(
                f"thread {tid}", f"has a security label of its own ({theirs}), not supported"
            )


def capture(stopped: Stopped) -> Capture[LabelRecord]:
    """Read the label."""
    label = _read(stopped.pid)
    yield []
    return LabelRecord(label)


def check_host(record: LabelRecord, _features: Features) -> Iterator[Finding]:
    """Name a label that the process would not have."""
    ours = _read(Pid(os.getpid()))
    if record.label and record.label != ours:
        yield Finding(
            "security label",
            f"the process had {record.label}, and ckpt has {ours or 'none'}",
            "run ckpt under that label (runcon, aa-exec)" if ours else "use a host with it",
        )


def restore(_record: LabelRecord, _rebuilt: Rebuilt) -> Restore:
    """Do nothing: it has the restorer's."""
    yield []


LABEL = Resource(
    "label",
    LabelRecord,
    Stage.PROCESS,
    capture=capture,
    restore=restore,
    look=look,
    check_host=check_host,
)
