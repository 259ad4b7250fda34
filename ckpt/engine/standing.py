"""A tree that is complete and stands still: how it comes to that, and how it is let go.

arrive        its network is held, its addresses may come
check         this host: pids, files, clocks; everything that is wrong is named together
open          files, by us, to be inherited
plant         the seed makes the embryo of the root, with the pid of the image
build         all processes, threads, and what they have (`building`)

    with expecting(tree, features, contents, options) as site, standing(building, site) as stands:
        stands.finish()         what the rest of the host can see: connections wake, names appear
        stands.arm(chain_id)    the next dump can be a delta on this generation
        stands.let_go()

Until it is let go, any failure and our own end leave nothing behind. Neighbours: `expecting` has
what comes before the building, `building` makes the processes; `restore` and migration come to the
end of it each in its own time.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence

import attrs

from ckpt import fault
from ckpt.engine.building import Building, Part
from ckpt.engine.content_files import Contents
from ckpt.engine.expecting import Site
from ckpt.engine.ground import Ground
from ckpt.engine.home import Home
from ckpt.engine.identity import read_exec_id
from ckpt.engine.layout import choose_arena, number_inherited, spans_of
from ckpt.engine.pages import own_mappings
from ckpt.engine.preparing import Files
from ckpt.engine.tracking import Tracking, attach_each, drop_epoch, tracking
from ckpt.errors import (
    CkptError,
    FeatureMissing,
    HostFull,
    NotPermitted,
    RestoreFailed,
    TargetGone,
)
from ckpt.image.format import Manifest
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features
from ckpt.kernel.procfs.stat import read_task_stat
from ckpt.process.arena import ARENA_SIZE
from ckpt.process.remote import call
from ckpt.process.seed import Embryo, plant, see_off
from ckpt.process.singles import Single, run_singles
from ckpt.process.task import Task
from ckpt.process.tree import read_identity
from ckpt.resources.base import run_all
from ckpt.resources.registry import clock_offsets, highest_fd
from ckpt.tracker.base import TrackerName
from ckpt.tracker.choose import choose_tracker
from ckpt.tracker.epoch import advance_each, read_epoch, read_void
from ckpt.units import Pid, Tid


@attrs.define(repr=False)
class Standing:
    """A tree that has everything but its arenas removed and its threads running."""

    building: Building
    files: Files
    contents: Contents
    home: Home
    """Where its numbers count."""
    _arenas_gone: bool = False

    @property
    def root(self) -> Pid:
        """The process that all others descend from, as we see it."""
        return self.building.parts[self.building.tree.root.pid].embryo.pid

    def finish(self) -> None:
        """Do what others on this host can see: connections leave repair mode, names appear.

        Raises:
            RestoreFailed: the kernel refused some of it.
        """
        with self.home.entered():
            self.files.run_at_last()
        self.contents.finish()
        fault.reach("restore-seen")

    def arm(self, chain_id: str) -> None:
        """Arm the trackers, so that the next dump into the chain can be a delta on this generation.

        That a tracker cannot be armed does not stop a restore: the next dump is then full.
        """
        self._arenas_gone = True
        lazy = bool(self.building.servers)
        if lazy:
            # A mapping has one userfaultfd, and the server's is needed until all pages are there.
            self.building.warn("the next incremental dump will be full: the restore is lazy")
        parts = list(self.building.parts.values())
        _forget_epochs(parts)
        with contextlib.ExitStack() as stack:
            armed = [] if lazy else _attach_trackers(self.building, parts, stack)
            fault.reach("restore-attached")
            _unmap_arenas(parts)
            fault.reach("restore-bare")
            _arm(self.building, armed, chain_id)
            fault.reach("restore-advanced")

    def let_go(self) -> None:
        """Let all threads run, with or without their trackers armed."""
        parts = list(self.building.parts.values())
        if not self._arenas_gone:
            _forget_epochs(parts)
            _unmap_arenas(parts)
        self.home.settle()
        run_all(self.files.at_go)
        _let_go(parts)
        for server in self.building.servers:
            server.start()


@contextlib.contextmanager
def standing(building: Building, site: Site, ground: Ground | None = None) -> Iterator[Standing]:
    """Build the tree, on what is there of it already; end all of it unless it was let go.

    Raises:
        PidTaken: a number is in use.
        RestoreFailed: the kernel refused something.
        ImageCorrupt: a frame does not decode.
    """
    tree, contents, home = site.tree, site.contents, site.home
    with contextlib.ExitStack() as stack:
        contents.fill(building.reader)
        fault.reach("restore-contents")
        files = site.open()
        stack.callback(_close_servers, building)
        fault.reach("restore-opened")
        highest = highest_fd(process.resources for process in tree.processes)
        if ground is not None:
            highest = max(highest, ground.highest_on_the_way(len(files.by_key)))
        fds, numbers = number_inherited(files.by_key, highest)
        inherited = files.of_each(numbers)
        for pid, part in building.parts.items():
            part.inherited = inherited(pid)
        if ground is not None:
            ground.begin(tree, fds, {pid: part.wanted for pid, part in building.parts.items()})
            for pid, prefilled in ground.prefilled.items():
                building.parts[pid].prefilled = prefilled
            building.build(ground.nursery)
            yield Standing(building, files, contents, home)
            return
        arena_at = choose_arena(
            spans_of(vma.span for one in tree.processes for vma in one.resources["memory"].vmas)
        )
        offsets = clock_offsets(tree.root.resources)
        with plant(tree.root.pid, fds, offsets, arena_at, home.space) as nursery:
            fault.reach("restore-planted")
            building.build(nursery)
            yield Standing(building, files, contents, home)


def _close_servers(building: Building) -> None:
    for server in building.servers:
        server.close()


def _forget_epochs(parts: Sequence[Part]) -> None:
    """Remove the epochs of processes that had these numbers before."""
    for part in parts:
        pid = part.embryo.reachable_as
        old = read_epoch(pid) or read_void(pid)
        if old is not None:
            drop_epoch(old)


def _attach_trackers(
    building: Building, parts: Sequence[Part], stack: contextlib.ExitStack
) -> list[tuple[Part, Tracking]]:
    """Make what must be made inside, of all at once; return of which processes that was done."""
    name = _tracker_name(building.reader.manifest, building.features)
    wanted = []
    for part in parts:
        if part.image.has_memory:
            pid = part.embryo.reachable_as
            lent = tracking(read_identity(pid), read_exec_id(pid), name, building.features)
            wanted.append((part, stack.enter_context(lent)))
    try:
        attach_each([(lent, part.embryo.arena, part.embryo.leader) for part, lent in wanted])
    except _NO_DELTA as error:
        building.warn(f"the next incremental dump will be full: {error}")
        return []
    return wanted


def _arm(building: Building, armed: Sequence[tuple[Part, Tracking]], chain_id: str) -> None:
    """Arm trackers against what their processes come from; the arenas are gone."""
    manifest = building.reader.manifest
    for part, lent in armed:
        lent.collect(own_mappings(part.image.resources["memory"]), [])
    fault.reach("restore-armed")
    try:
        advance_each(
            [lent.epoch(chain_id, manifest.generation, manifest.digest) for _, lent in armed]
        )
    except _NO_DELTA as error:
        building.warn(f"the next incremental dump will be full: {error}")


_NO_DELTA = (FeatureMissing, NotPermitted, HostFull)
"""What only the next delta suffers from: this host, or the process, cannot."""


def _tracker_name(manifest: Manifest, features: Features) -> TrackerName:
    """Use the tracker of the image, so that the next delta continues it, or what works here."""
    try:
        return choose_tracker(manifest.tracker, features)
    except (CkptError, ValueError):
        return choose_tracker("auto", features)


def _unmap_arenas(parts: Sequence[Part]) -> None:
    """Take the arenas away by their own last instruction: the stop comes before the next is read.

    One memory has one arena, which goes with whom the memory is of.
    """
    removing = []
    for part in parts:
        if part.image.has_memory:
            embryo, arena = part.embryo, part.embryo.arena
            unmap = call(NR.munmap, arena.base, ARENA_SIZE)
            removing.append(Single(embryo.leader, arena.insn, unmap))
    for reply in run_singles(removing):
        if isinstance(reply, CkptError):
            raise reply
        if not reply.ok:
            raise RestoreFailed("removing the arena", str(reply))


def _let_go(parts: list[Part]) -> None:
    """Give every thread its own state; then none fails any more, and all run."""
    stopping: list[Embryo] = []
    others: list[Embryo] = []
    for part in parts:
        tasks = part.embryo.tasks.values()
        for task in tasks:
            task.disturbed = True
            task.put_back()
        if part.image.stopped_by or any(task.deferred_stop for task in tasks):
            os.kill(part.embryo.pid, signal.SIGSTOP)
            stopping.append(part.embryo)
        else:
            others.append(part.embryo)
    fault.reach("restore-put-back")
    for part in parts:
        # From here on our own end lets them run, too: no part of a tree is left without the rest.
        for task in part.embryo.tasks.values():
            ptrace.set_options(task.tid, ptrace.Option.NONE)
    fault.reach("restore-released")
    for embryo in stopping:
        _detach(embryo)
    _await_stops(stopping)
    for embryo in others:
        _detach(embryo)


def _await_stops(embryos: Sequence[Embryo]) -> None:
    """Wait until they stand still as they did, or have ended: before anybody runs who knows that.

    A SIGCONT of his that came earlier would find nobody to continue, and tell nobody of it.
    """
    give_up_s = time.monotonic() + _STOPS_S
    for embryo in embryos:
        for task in embryo.tasks.values():
            with contextlib.suppress(TargetGone):
                while not _stands(embryo, task) and time.monotonic() < give_up_s:
                    time.sleep(_NAP_S)


def _stands(embryo: Embryo, task: Task) -> bool:
    return read_task_stat(embryo.reachable_as, task.tid).state in _STOPPED_OR_ENDED


_STOPPED_OR_ENDED = "TZX"
_STOPS_S = 10.0
"""Of a processor that others want, a process of the idle class has a thousandth."""
_NAP_S = 0.0002


def _detach(embryo: Embryo) -> None:
    # The leader last: it can be waited for only when the other threads have been.
    for task in reversed(embryo.tasks.values()):
        try:
            ptrace.detach(task.tid)
        except TargetGone:
            # Those that run already have ended the process. How it ended, the leader tells.
            if task.tid != Tid(embryo.pid):
                see_off(task.tid)
