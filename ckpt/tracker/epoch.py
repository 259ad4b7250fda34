"""The epoch: which generation last re-armed the tracker of a live process.

A tracker's state lies in the kernel and belongs to one process; what it says is true only against
the generation that armed it. That is written here, in one small file per process, shared by all
image directories: a dump into another one makes this one's next dump full.

Order, so that no crash makes a wrong delta: `invalidate` before the tracker is touched, `advance`
after the generation is committed. In between there is no epoch, and the next dump is full. What it
was stays as `void`: nothing of it may be believed, but the next dump finds the keeper there, which
otherwise nobody would ever end.

    PID.epoch     of the process PID
    PID.void      the same, not valid any more, or not yet
    PID.writing   by the ckpt PID; renamed at once

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

from ckpt import fault
from ckpt.errors import HostFull, TargetGone
from ckpt.process.keeper import stop_keeper
from ckpt.process.tree import Identity, read_boot_id, read_identity
from ckpt.tracker.base import TrackerName
from ckpt.units import GenerationNo, Pid

STATE_DIR = Path("/run/ckpt")
"""Root's own, and gone (or known to be old, by the boot id) after a reboot."""
_NAME = re.compile(r"([1-9][0-9]{0,9})\.(epoch|void|writing|frames|layout)", re.ASCII)
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


def _path(pid: Pid, kind: str = "epoch") -> Path:
    return STATE_DIR / f"{pid}.{kind}"


def read_epoch(pid: Pid) -> Epoch | None:
    """Return the epoch of a process, None if there is none or it cannot be understood."""
    return _read(_path(pid))


def read_void(pid: Pid) -> Epoch | None:
    """Return what the epoch of a process was before it was invalidated; only for its keeper."""
    return _read(_path(pid, "void"))


def _read(path: Path) -> Epoch | None:
    try:
        raw = json.loads(path.read_bytes())
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
        os.rename(_path(pid), _path(pid, "void"))


def forget(pid: Pid) -> None:
    """Forget all of a process: nothing that it names is there any more."""
    for kind in ("epoch", "void"):
        with contextlib.suppress(FileNotFoundError):
            _path(pid, kind).unlink()


def advance(epoch: Epoch) -> None:
    """Do what `advance_each` does, for one."""
    advance_each([epoch])


def advance_each(epochs: Iterable[Epoch]) -> None:
    """Write epochs, each whole or not at all; no fsync, for a reboot ends them anyway.

    Ends the keeper that an epoch does not name any more; removes what is left of processes that
    have ended.

    Raises:
        HostFull: the state directory cannot be written; the next dump of those whose turn would
            have come is then full.
    """
    try:
        STATE_DIR.mkdir(mode=0o700, exist_ok=True)
        for epoch in epochs:
            _advance(epoch)
    except OSError as error:
        raise HostFull(
            f"cannot note in {STATE_DIR} what the tracker is armed against ({error.strerror})",
            "the next dump of this process will be full",
        ) from error
    # Once for all of them: it looks at everything that is there.
    _remove_ended()


def _advance(epoch: Epoch) -> None:
    pid = epoch.process.pid
    old = read_void(pid)
    if old is not None and old.keeper is not None and old.keeper != epoch.keeper:
        stop_keeper(old.keeper)
    writing = _path(Pid(os.getpid()), "writing")
    fd = os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            json.dump(attrs.asdict(epoch), file)
        os.rename(writing, _path(pid, "void"))
    except OSError:
        writing.unlink(missing_ok=True)
        raise
    # From here on its keeper is found by the next dump, whatever becomes of us.
    fault.reach("epoch-noted")
    os.rename(_path(pid, "void"), _path(pid))


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
    return _has_ended(pid, read_epoch(pid))


def _void_has_ended(pid: Pid) -> bool:
    return _has_ended(pid, read_void(pid))


def _has_ended(pid: Pid, epoch: Epoch | None) -> bool:
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


_ENDED = {
    "epoch": _epoch_has_ended,
    "void": _void_has_ended,
    "writing": _is_gone,
    "frames": _frames_have_ended,
    "layout": _is_gone,
}


def _lives(process: Identity) -> bool:
    if process.boot_id != read_boot_id():
        return False
    with contextlib.suppress(TargetGone):
        return read_identity(process.pid) == process
    return False
