"""The epoch: which generation last re-armed the tracker of a live process.

A tracker's state lies in the kernel and belongs to one process; what it says is true only against
the generation that armed it. That is written here, in one small file per process, shared by all
image directories: a dump into another one makes this one's next dump full.

Order, so that no crash makes a wrong delta: `invalidate` before the tracker is touched, `advance`
after the generation is committed. In between there is no epoch, and the next dump is full.

Whoever writes an epoch removes what is left of processes that have ended, or of another boot. When
two do so at once, or when a pid is used again at that moment, the worst is an epoch too few.
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from ckpt.errors import HostFull, TargetGone
from ckpt.process.tree import Identity, read_boot_id, read_identity
from ckpt.tracker.base import TrackerName
from ckpt.units import GenerationNo, Pid

STATE_DIR = Path("/run/ckpt")
"""Root's own, and gone (or known to be old, by the boot id) after a reboot."""
_NAME = re.compile(r"([1-9][0-9]{0,9})\.(epoch|frames|layout)", re.ASCII)
_PAIR_BYTES = 16
"""A `frames` file holds pairs of words (`tracker/frames.py`)."""


@attrs.frozen(slots=True, repr=False)
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
    """Do what `advance_each` does, for one."""
    advance_each([epoch])


def advance_each(epochs: Iterable[Epoch]) -> None:
    """Write epochs, each whole or not at all; no fsync, for a reboot ends them anyway.

    Removes what is left of processes that have ended.

    Raises:
        HostFull: the state directory cannot be written; the next dump of those whose turn would
            have come is then full.
    """
    # Not at the start, which is before the freeze: it brings half of the standard library along.
    import tempfile

    try:
        STATE_DIR.mkdir(mode=0o700, exist_ok=True)
        for epoch in epochs:
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
    # Once for all of them: it looks at everything that is there.
    _remove_ended()


def _remove_ended() -> None:
    """Remove the files of ended processes; what is not certainly ours, or of one, is left alone."""
    with contextlib.suppress(OSError):
        for path in list(_iter_ended()):
            path.unlink(missing_ok=True)


def _iter_ended() -> Iterator[Path]:
    with os.scandir(STATE_DIR) as entries:
        for entry in entries:
            name = _NAME.fullmatch(entry.name)
            # Another dump may have removed it meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if name and stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                    ended = _ENDED[name[2]]
                    if ended(Pid(int(name[1]))):
                        yield Path(entry.path)


def _epoch_has_ended(pid: Pid) -> bool:
    epoch = read_epoch(pid)
    return epoch is not None and epoch.process.pid == pid and not _lives(epoch.process)


def _frames_have_ended(pid: Pid) -> bool:
    """Tell whether nobody has this pid: a dump under way has frames and no epoch yet."""
    if (STATE_DIR / f"{pid}.frames").stat().st_size % _PAIR_BYTES:
        return False
    return _is_gone(pid)


def _is_gone(pid: Pid) -> bool:
    with contextlib.suppress(TargetGone):
        read_identity(pid)
        return False
    return True


_ENDED = {"epoch": _epoch_has_ended, "frames": _frames_have_ended, "layout": _is_gone}


def _lives(process: Identity) -> bool:
    if process.boot_id != read_boot_id():
        return False
    with contextlib.suppress(TargetGone):
        return read_identity(process.pid) == process
    return False
