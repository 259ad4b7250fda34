"""The epoch: which generation last re-armed the tracker of a live process.

A tracker's state lies in the kernel and belongs to one process; what it says is true only against
the generation that armed it. That is written here, in one small file per process, shared by all
image directories: a dump into another one makes this one's next dump full.

Order, so that no crash makes a wrong delta: `invalidate` before the tracker is touched, `advance`
after the generation is committed. In between there is no epoch, and the next dump is full.
"""

import contextlib
import json
import os
from pathlib import Path

import attrs

from ckpt.errors import HostFull
from ckpt.process.tree import Identity
from ckpt.tracker.base import TrackerName
from ckpt.units import GenerationNo, Pid

STATE_DIR = Path("/run/ckpt")
"""Root's own, and gone (or known to be old, by the boot id) after a reboot."""


@attrs.frozen(slots=True)
class Epoch:
    """What the tracker of one process is armed against."""

    process: Identity
    exec_id: str
    """Changes when the process calls exec (`engine/identity.py`)."""
    chain_id: str
    generation: GenerationNo
    digest: str
    """Of its manifest, hexadecimal: numbers are given again when a directory is cleared by hand."""
    tracker: TrackerName
    keeper: Identity | None
    """Who holds the userfaultfd, with the writeprotect tracker."""


def _path(pid: Pid) -> Path:
    return STATE_DIR / f"{pid}.epoch"


def read_epoch(pid: Pid) -> Epoch | None:
    """Return the epoch of a process, None if there is none or it cannot be understood."""
    try:
        raw = json.loads(_path(pid).read_bytes())
        return Epoch(
            process=Identity(**raw["process"]),
            exec_id=str(raw["exec_id"]),
            chain_id=str(raw["chain_id"]),
            generation=GenerationNo(int(raw["generation"])),
            digest=str(raw["digest"]),
            tracker=TrackerName(raw["tracker"]),
            keeper=Identity(**raw["keeper"]) if raw["keeper"] else None,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def invalidate(pid: Pid) -> None:
    """Forget the epoch of a process: from now on nothing may be believed to be unchanged."""
    with contextlib.suppress(FileNotFoundError):
        _path(pid).unlink()


def advance(epoch: Epoch) -> None:
    """Write the epoch, whole or not at all; nothing is fsync'ed, for a reboot ends it anyway.

    Raises:
        HostFull: the state directory cannot be written; the next dump is then full.
    """
    # Not at the start, which is before the freeze: it brings half of the standard library along.
    import tempfile

    try:
        STATE_DIR.mkdir(mode=0o700, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=STATE_DIR, prefix=".epoch-")
        try:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                json.dump(attrs.asdict(epoch), file)
            os.rename(temporary, _path(epoch.process.pid))
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise HostFull(
            f"cannot note in {STATE_DIR} what the tracker is armed against ({error.strerror})",
            "the next dump of this process will be full",
        ) from error
