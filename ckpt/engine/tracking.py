"""The tracker of one dump: opened, asked while frozen, and handed over after the commit.

Holds together what `tracker/` keeps apart: the epoch, the keeper, and the tracker itself.
"""

import contextlib
from collections.abc import Iterable, Iterator

import attrs

from ckpt.engine.identity import read_exec_id
from ckpt.kernel.features import Features
from ckpt.process.arena import Arena
from ckpt.process.keeper import start_keeper, stop_keeper, take_userfaultfd
from ckpt.process.task import Task
from ckpt.process.tree import Identity
from ckpt.tracker.base import Scan, Tracker, TrackerName
from ckpt.tracker.epoch import Epoch, forget, invalidate, read_void
from ckpt.tracker.spans import Own, Spans
from ckpt.tracker.writeprotect import WriteProtect, create_each_inside
from ckpt.units import GenerationNo, Pid


@attrs.define(repr=False)
class Tracking:
    """One process's tracker for the length of a dump or of a restore."""

    process: Identity
    exec_id: str
    name: TrackerName
    features: Features
    _keeper: Identity | None = None
    """Who holds the userfaultfd already."""
    _writeprotect: WriteProtect | None = None
    _collected: bool = False

    @property
    def pid(self) -> Pid:
        """The process."""
        return self.process.pid

    def take_over(self, epoch: Epoch | None) -> bool:
        """Take the tracker's state that an earlier dump left; False if it is lost."""
        if self.name is not TrackerName.WRITEPROTECT:
            return True
        # Of a dump that failed, or was killed, nothing can be believed, but its keeper holds on.
        epoch = epoch or read_void(self.pid)
        if epoch is None or epoch.process != self.process or epoch.exec_id != self.exec_id:
            return False
        fd = take_userfaultfd(epoch.keeper) if epoch.keeper else None
        if fd is None:
            return False
        self._keeper = epoch.keeper
        self._writeprotect = WriteProtect(fd)
        return True

    @property
    def is_attached(self) -> bool:
        """Whether `attach` has nothing to do."""
        return self.name is not TrackerName.WRITEPROTECT or self._writeprotect is not None

    def attach(self, arena: Arena, task: Task) -> None:
        """Make what must be made inside the frozen process, if it is not there yet."""
        attach_each([(self, arena, task)])

    def adopt(self, made: WriteProtect) -> None:
        """Take what was made inside; it is closed with this."""
        self._writeprotect = made

    def follow_exec(self) -> None:
        """Give up what watched the memory of another program, which the frozen process was."""
        exec_id = read_exec_id(self.pid)
        if exec_id == self.exec_id:
            return
        self.close()
        if self._keeper is not None:
            stop_keeper(self._keeper)
            self._keeper = None
        self.exec_id = exec_id

    def peek(self, own: Own) -> Spans:
        """Return what was written, roughly, and change nothing; for an estimate."""
        return self._tracker().peek(self.pid, own)

    def unwritten(self, spans: Spans) -> Spans | None:
        """Return which pages were certainly not written since the last `collect`; changes nothing.

        None: nobody can tell without a `collect`.
        """
        if self._writeprotect is None:
            return None
        return self._writeprotect.unwritten(self.pid, spans)

    def watches_all(self, own: Own) -> bool:
        """Tell whether `watch` would have nothing to do; see `base.Tracker.watches_all`."""
        return self._tracker().watches_all(self.pid, own)

    def watch(self, own: Own) -> None:
        """Prepare the mappings of the frozen process; see `base.Tracker.watch`."""
        self._tracker().watch(self.pid, own)

    def collect(self, own: Own, likely: Spans, *, running: bool = False) -> Scan:
        """Ask the tracker and re-arm it; from here on the old epoch is void."""
        if not self._collected:
            invalidate(self.pid)
            self._collected = True
        return self._tracker().collect(self.pid, own, likely, running=running)

    def _tracker(self) -> Tracker:
        if self.name is TrackerName.WRITEPROTECT:
            assert self._writeprotect is not None, "attach comes before collect"
            return self._writeprotect
        # Imported where used: a dump counts milliseconds until it can touch the target.
        if self.name is TrackerName.SOFTDIRTY:
            from ckpt.tracker.softdirty import SoftDirty

            return SoftDirty(self.features)
        if self.name is TrackerName.COMPARE:
            from ckpt.tracker.compare import Compare

            return Compare(self.features)
        from ckpt.tracker.full import Full

        return Full(self.features)

    def epoch(self, chain_id: str, generation: GenerationNo, digest: bytes) -> Epoch:
        """Return what says that the tracker is armed against a generation that is committed.

        What it needs lives on without us from now on.

        Raises:
            TargetGone: the process has ended.
        """
        if self._writeprotect is not None and self._keeper is None:
            self._keeper = start_keeper(self.pid, self._writeprotect.fd)
        return Epoch(
            process=self.process,
            exec_id=self.exec_id,
            chain_id=chain_id,
            generation=generation,
            digest=digest.hex(),
            tracker=self.name,
            keeper=self._keeper,
        )

    def close(self) -> None:
        """Close our own descriptors; what a keeper holds goes on."""
        if self._writeprotect is not None:
            self._writeprotect.close()
            self._writeprotect = None


def attach_each(wanted: Iterable[tuple[Tracking, Arena, Task]]) -> None:
    """Make what must be made inside of frozen processes, of all at once.

    Args:
        wanted: of each process: its tracking, an arena in it, a task that makes the calls.

    Raises:
        FeatureMissing: the kernel refused it, in one of them.
        TargetGone: one of them has ended.
    """
    missing = []
    for lent, arena, task in wanted:
        lent.follow_exec()
        if not lent.is_attached:
            missing.append((lent, arena, task))
    made = create_each_inside([(lent.pid, arena, task) for lent, arena, task in missing])
    for (lent, _, _), one in zip(missing, made, strict=True):
        lent.adopt(one)


@contextlib.contextmanager
def tracking(
    process: Identity, exec_id: str, name: TrackerName, features: Features
) -> Iterator[Tracking]:
    """Lend the tracking of one process."""
    lent = Tracking(process, exec_id, name, features)
    try:
        yield lent
    finally:
        lent.close()


def drop_epoch(epoch: Epoch) -> None:
    """End the tracking that an epoch stands for: its process is gone, or another tracker comes."""
    # While the keeper lives, there is something that names it.
    invalidate(epoch.process.pid)
    if epoch.keeper is not None:
        stop_keeper(epoch.keeper)
    forget(epoch.process.pid)
