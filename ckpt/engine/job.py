"""The job of an image directory: what `ckpt run` notes there beside the generations.

    run.lock    held by whoever supervises the job, and by the checkpoints that it takes
    run.json    the command, since which generation it runs, who it is now, how it has ended

Of the command only its words are compared with those of the next start: nothing that stands in the
note is ever run. Readers of images ignore both names (images/FORMAT.md). Neighbour: `supervising`.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from ckpt.errors import HostFull, ImageBusy, ImageCorrupt, ImageUnusable, TargetGone
from ckpt.process.tree import Identity, is_zombie, read_boot_id, read_identity
from ckpt.units import GenerationNo, Pid

LOCK_NAME = "run.lock"
NOTE_NAME = "run.json"
_NEW_NAME = "run.json.new"
_VERSION = 1
_MODE = 0o600
_MAX_BYTES = 16 << 20
"""More than any command line: the kernel takes 6 MiB."""


@attrs.frozen
class Job:
    """What was started, and what has become of it."""

    command: tuple[str, ...]
    first: GenerationNo
    """The first generation that is of this job; those below are of one that was given up."""
    boot_id: str
    """Of the kernel on which it was last started, or brought back."""
    pid: int = 0
    """Of its root, as we saw it; 0: it does not run."""
    start_ticks: int = 0
    streams: tuple[str, str] = ("", "")
    """Where its standard output and error led when it was started, as /proc shows it."""
    ended: int | None = None
    """With which exit status, as a shell tells it; None: it has not ended by itself."""
    newest: GenerationNo | None = None
    """The last checkpoint that was taken, noted after it was on the disk: if that is not there any
    more, somebody has taken it away. Notes of older versions do not have it."""

    def runs(self) -> bool:
        """Tell whether that very process still lives, whoever started it."""
        if not self.pid or self.boot_id != read_boot_id():
            return False
        try:
            found = read_identity(Pid(self.pid))
        except TargetGone:
            return False
        same = found == Identity(self.boot_id, Pid(self.pid), self.start_ticks)
        return same and not is_zombie(Pid(self.pid))

    def as_process(self, pid: Pid) -> "Job":
        """Return the same with a process that was just made."""
        identity = read_identity(pid)
        return attrs.evolve(
            self, boot_id=identity.boot_id, pid=int(pid), start_ticks=identity.start_ticks
        )


@attrs.frozen
class Note:
    """Where the job of a directory is written down; use `owned`."""

    directory: Path

    @property
    def _path(self) -> Path:
        return self.directory / NOTE_NAME

    def read(self) -> Job | None:
        """Return what was noted, None if nothing was.

        Raises:
            ImageCorrupt: it cannot be understood.
            ImageUnusable: it cannot be read.
        """
        try:
            with open(self._path, "rb") as file:
                raw = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = f"cannot read it: {error.strerror}"
            raise ImageUnusable(str(self._path), reason) from error
        try:
            return _parse(json.loads(raw))
        except (ValueError, KeyError, TypeError) as error:
            reason = "it is no note of a job (--again starts the command over)"
            raise ImageCorrupt(str(self._path), reason) from error

    def write(self, job: Job) -> None:
        """Write it down, whole or not at all; it is on the disk when this returns.

        Raises:
            HostFull: it cannot be written.
        """
        new = self.directory / _NEW_NAME
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
            with os.fdopen(fd, "w", encoding="ascii") as file:
                json.dump({"version": _VERSION} | attrs.asdict(job), file)
                file.flush()
                os.fsync(fd)
            os.rename(new, self._path)
        except OSError as error:
            raise HostFull(
                f"cannot write {self._path} ({error.strerror})",
                "make room or choose another image directory",
            ) from error

    def remove(self) -> None:
        """Forget the job."""
        self._path.unlink(missing_ok=True)


def _parse(raw: dict[str, Any]) -> Job:
    if raw["version"] != _VERSION:
        raise ValueError("of another version")
    command, streams, ended = raw["command"], raw["streams"], raw["ended"]
    newest = raw.get("newest")
    if not command or not all(isinstance(word, str) for word in [*command, *streams]):
        raise ValueError("no command")
    out, err = streams
    return Job(
        command=tuple(command),
        first=GenerationNo(int(raw["first"])),
        boot_id=str(raw["boot_id"]),
        pid=int(raw["pid"]),
        start_ticks=int(raw["start_ticks"]),
        streams=(out, err),
        ended=None if ended is None else int(ended),
        newest=None if newest is None else GenerationNo(int(newest)),
    )


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[Note]:
    """Be the only supervisor of the job of a directory.

    Kernel: two locks on one file. That of fcntl(2) is ours alone and goes when we die: who cannot
    have it is told. That of flock(2) goes with the descriptor to the checkpoints that we fork. One
    that a killed supervisor has left behind ends by itself in a moment, and is waited for.

    Raises:
        ImageBusy: another `ckpt run` has it.
        ImageUnusable: the lock file cannot be made.
    """
    path = directory / LOCK_NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
    except OSError as error:
        raise ImageUnusable(str(path), f"cannot open it: {error.strerror}") from error
    try:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ImageBusy(str(directory)) from error
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield Note(directory)
    finally:
        os.close(fd)
