"""Asking every resource of a frozen process, with as few stops as can be.

What can be read from outside is read first, before an arena exists, so that no record shows our own
mapping. Then the remote calls of all resources of a process run as one batch, and those of each
thread as one; all threads of all processes at the same time.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from ckpt.engine.family import Family
from ckpt.engine.records import (
    OUTER_GROUP,
    EndedLeader,
    Place,
    ProcessImage,
    ThreadImage,
    TreeImage,
    ZombieImage,
    with_shared,
)
from ckpt.errors import CkptError, FeatureMissing, Finding, TargetGone, UnsupportedState
from ckpt.kernel.features import Features
from ckpt.kernel.procfs.held import HeldFiles
from ckpt.kernel.procfs.stat import Stat, read_stat
from ckpt.process.arena import Arena
from ckpt.process.clones import Clones, Shares
from ckpt.process.freezer import Frozen, FrozenTree
from ckpt.process.remote import Call, Reply, part_of
from ckpt.process.task import Task
from ckpt.process.together import Asked, try_on_all
from ckpt.process.tree import (
    ending_told,
    has_ended,
    is_zombie,
    list_tids,
    list_tree,
    number_of,
    refuse_untouchable,
)
from ckpt.resources.base import Capture, CaptureOptions, Resource, Stopped, Target, Tree
from ckpt.resources.registry import PROCESS, THREAD, beside
from ckpt.units import Pid, Tid


def look(pid: Pid, features: Features, options: CaptureOptions | None = None) -> list[Finding]:
    """Return all that stands in the way of a dump of a process and its descendants.

    They are not touched.
    """
    with beside(pid) as mounts:
        options = attrs.evolve(options or CaptureOptions(), mounts=mounts)
        looked, findings = _look(pid, features, options)
        looked.tree.forget()
        return findings


_MOST_LOOKS = 20
"""At a tree in which processes end all the time."""


@attrs.frozen(repr=False)
class Looked:
    """A tree that was looked at, and in whose way nothing stands."""

    tree: Tree
    targets: Mapping[Pid, Target]


def examine(root: Pid, features: Features, options: CaptureOptions) -> Looked:
    """Look at a tree before it is stopped; what was read is noted for the capture.

    State: files of /proc are open until `Tree.forget` is called, by whoever has asked.

    Raises:
        UnsupportedState: it owns what cannot be captured; all findings at once.
        FeatureMissing: this kernel does not tell what must be known.
    """
    looked, findings = _look(root, features, options)
    if findings:
        looked.tree.forget()
        raise UnsupportedState(root, tuple(findings))
    return looked


def _look(root: Pid, features: Features, options: CaptureOptions) -> tuple[Looked, list[Finding]]:
    """Look at all processes; begin again where one has ended that others were asked about."""
    with ending_told([root]):
        for _ in range(_MOST_LOOKS - 1):
            with contextlib.suppress(TargetGone):
                return _look_once(root, features, options)
            if has_ended(root):
                break
        return _look_once(root, features, options)


def _look_once(
    root: Pid, features: Features, options: CaptureOptions
) -> tuple[Looked, list[Finding]]:
    tree = Tree(tuple(list_tree(root)), options)
    tree.numbers = dict(_iter_numbers(tree.pids))
    _require_seen(tree, features)
    if features.kcmp:
        clones = tree.notes[_CLONES] = Clones(tree.pids)
        tree.shares = clones.confirm(tree.pids)
    targets: dict[Pid, Target] = {}
    try:
        findings = list(_iter_all_findings(tree, features, targets))
    except BaseException:
        tree.forget()
        raise
    return Looked(tree, targets), findings


def _require_seen(tree: Tree, features: Features) -> None:
    """Refuse processes that may share (clone(2)) what this kernel does not tell of."""
    if not features.kcmp and len(tree.pids) > 1:
        raise FeatureMissing(
            "kcmp, which tells what processes share", "use a kernel with CONFIG_KCMP"
        )


def _iter_all_findings(
    tree: Tree, features: Features, targets: dict[Pid, Target]
) -> Iterator[Finding]:
    for pid in tree.pids:
        try:
            target = Target(pid, features, {}, tree)
            yield from _name_process(tree, pid, _look_at(target, targets))
        except TargetGone:
            # A descendant may end at any time.
            if pid == tree.pids[0] or not is_zombie(pid):
                raise
    yield from _look_at_family(tree)


_CLONES = "who shares what"


def _look_at_family(tree: Tree) -> list[Finding]:
    """Name who could not be made again as he was; `family.refuse_unplannable` asks once more."""
    places: dict[Pid, Place] = {}
    numbers = tree.numbers
    for number in numbers.values():
        # A descendant may end at any time.
        with contextlib.suppress(TargetGone):
            place = _place_of(read_stat(number))
            if not places or place.parent in places:
                places[number] = place
    shares = {
        numbers[pid]: with_numbers(one, numbers)
        for pid, one in tree.shares.items()
        if {pid, *(owner for _, owner in one.items())} <= numbers.keys()
    }
    if tree.pids[0] not in numbers:
        return []
    return list(Family(numbers[tree.pids[0]], places, shares).iter_findings())


def _iter_numbers(pids: Iterable[Pid]) -> Iterator[tuple[Pid, Pid]]:
    for pid in pids:
        with contextlib.suppress(TargetGone):
            yield pid, number_of(pid)


def with_numbers(shares: Shares, numbers: Mapping[Pid, Pid]) -> Shares:
    """Return the same, with the pids of whose it is; see `tree.number_of`."""
    return Shares(**{common.value: numbers.get(owner, owner) for common, owner in shares.items()})


def _look_at(target: Target, targets: dict[Pid, Target]) -> list[Finding]:
    if target.pid != target.tree.pids[0]:
        refuse_untouchable(target.pid)
    findings = list(_iter_findings(target))
    names = [*_READ, *map(_status_of, list_tids(target.pid))]
    held = target.notes[_HELD] = HeldFiles(target.pid, names)
    target.tree.at_forgotten.append(held.close)
    targets[target.pid] = target
    return findings


def _iter_findings(target: Target) -> Iterator[Finding]:
    for resource in (*PROCESS, *THREAD):
        yield from resource.look(target)


def _name_process(tree: Tree, pid: Pid, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Say of which process each finding is, where there are several."""
    subject = f"process {pid}"
    for finding in findings:
        if len(tree.pids) > 1 and not finding.subject.startswith(subject):
            finding = attrs.evolve(finding, subject=f"{subject}, {finding.subject}")
        yield finding


_HELD = "files of /proc"
_READ = ("stat", *dict.fromkeys(name for resource in PROCESS for name in resource.reads))


def _status_of(tid: Tid) -> str:
    return f"task/{tid}/status"


def settle(image: TreeImage) -> TreeImage:
    """Build what is not built yet and complete the records of an image, after the thaw."""
    settled: dict[Pid, ProcessImage] = {}
    for process in image.processes:
        settled[process.pid] = _settle_process(process, settled)
    return attrs.evolve(image, processes=tuple(settled.values()))


def _settle_process(image: ProcessImage, before: Mapping[Pid, ProcessImage]) -> ProcessImage:
    own = _complete(filter(image.owns, PROCESS), image.resources)
    return attrs.evolve(
        image,
        resources=with_shared(own, image.shares, before),
        threads=tuple(
            attrs.evolve(thread, resources=_complete(THREAD, thread.resources))
            for thread in image.threads
        ),
    )


def _complete(kinds: Iterable[Resource[Any]], captured: Mapping[str, Any]) -> dict[str, Any]:
    return {resource.name: resource.complete(captured[resource.name]) for resource in kinds}


@attrs.define(repr=False)
class _Asked:
    """One resource's capture under way."""

    name: str
    capture: Capture[Any]
    calls: list[Call]
    record: Any = None


def retarget(frozen: FrozenTree, looked: Looked, features: Features) -> dict[Pid, Target]:
    """Return the targets of the capture: what was noted, of those that are there now.

    A process that was made since then is looked at now.

    Raises:
        UnsupportedState: it owns what cannot be captured.
    """
    tree = Tree(tuple(frozen.processes), looked.tree.options, looked.tree.notes)
    tree.at_forgotten = looked.tree.at_forgotten
    tree.numbers = {pid: one.number for pid, one in frozen.processes.items()}
    _require_seen(tree, features)
    if features.kcmp:
        clones: Clones = tree.notes.get(_CLONES) or Clones(tree.pids)
        tree.shares = clones.confirm(tree.pids)
    targets: dict[Pid, Target] = {}
    findings: list[Finding] = []
    for pid in tree.pids:
        known = looked.targets.get(pid)
        if known is not None:
            targets[pid] = attrs.evolve(known, tree=tree)
        else:
            target = Target(pid, features, {}, tree)
            findings += _name_process(tree, pid, _iter_findings(target))
            targets[pid] = target
    if findings:
        raise UnsupportedState(frozen.root, tuple(findings))
    return targets


def capture_zombies(frozen: FrozenTree, tree: Tree) -> tuple[ZombieImage, ...]:
    """Return the ended processes of the tree; whoever waits for them has not done it yet."""
    return tuple(_iter_zombies(frozen.zombies, tree))


def _iter_zombies(pids: Iterable[Pid], tree: Tree) -> Iterator[ZombieImage]:
    for pid in pids:
        # One that its parent need not wait for is gone with its end.
        with contextlib.suppress(TargetGone):
            yield _capture_zombie(pid, tree)


def _capture_zombie(pid: Pid, tree: Tree) -> ZombieImage:
    stat = read_stat(pid)
    return ZombieImage(pid, _place_below_root(stat, tree), stat.exit_code, stat.comm)


def _place_below_root(stat: Stat, tree: Tree) -> Place:
    place = _place_of(stat)
    if is_led_from_outside(tree, place.group):
        return attrs.evolve(place, group=OUTER_GROUP)
    return place


def _place_of(stat: Stat) -> Place:
    return Place(
        parent=Pid(stat.ppid),
        session=Pid(stat.session),
        group=Pid(stat.pgrp),
        exit_signal=stat.exit_signal,
    )


_LED_FROM_OUTSIDE = "groups that are led from outside"


def is_led_from_outside(tree: Tree, group: Pid) -> bool:
    """Tell whether a process group has a leader that is not of the tree."""
    known = tree.notes.setdefault(_LED_FROM_OUTSIDE, {})
    if group not in known:
        known[group] = group not in tree.pids and _leads_outside(tree, group)
    return bool(known[group])


def _leads_outside(tree: Tree, pid: Pid) -> bool:
    try:
        leader = read_stat(pid)
    except TargetGone:
        return False
    # One that has ended and was not waited for is of the tree if its parent is.
    return leader.pgrp == pid and Pid(leader.ppid) not in tree.pids


class Capturing:
    """The captures of all resources of a frozen process; begun without, ended with an arena."""

    def __init__(self, frozen: Frozen, target: Target) -> None:
        """Read everything that can be read from outside."""
        self._frozen = frozen
        self._tree = target.tree
        self._is_root = frozen.pid == target.tree.pids[0]
        self._read_held(target)
        leader = Stopped(frozen, frozen.leader, target.features, target.notes, target.tree)
        shares = target.tree.shares_of(frozen.pid)
        self._process = [
            _begin(resource, leader) for resource in PROCESS if not shares.of(resource.common)
        ]
        self._shares = with_numbers(shares, target.tree.numbers)
        self._threads: dict[Tid, list[_Asked]] = {}
        for tid, task in frozen.tasks.items():
            stopped = Stopped(frozen, task, target.features, target.notes, target.tree)
            self._threads[tid] = [_begin(resource, stopped) for resource in THREAD]

    def _read_held(self, target: Target) -> None:
        """Read what is held at once; what is new is read when it is asked for."""
        held: HeldFiles | None = target.notes.get(_HELD)
        texts = self._frozen.texts = held.read() if held else {}
        for tid, task in self._frozen.tasks.items():
            text = texts.get(_status_of(tid))
            if text is not None:
                task.status_text = text

    def under_way(self, arena: Arena) -> Iterator["_UnderWay"]:
        """Walk what is asked inside, by thread."""
        leader = self._frozen.leader
        # Process and leader are asked by the same thread: together, that is a batch less.
        yield _UnderWay(arena, leader, [*self._process, *self._threads[leader.tid]])
        for tid, asked in self._threads.items():
            if tid != leader.tid:
                yield _UnderWay(arena, self._frozen.tasks[tid], asked)

    def image(self) -> ProcessImage:
        """Return all records; `finish_all` comes before."""
        frozen = self._frozen
        # Of a first thread that has ended /proc/PID tells what the others do not.
        stat = frozen.stat if frozen.number == frozen.pid else read_stat(frozen.number)
        if self._is_root:
            place = attrs.evolve(_place_of(stat), parent=Pid(0))
        else:
            place = _place_below_root(stat, self._tree)
        return ProcessImage(
            pid=frozen.number,
            place=place,
            stopped_by=frozen.leader.group_stopped,
            resources=_records_of(self._process),
            threads=tuple(
                ThreadImage(tid, _records_of(asked)) for tid, asked in self._threads.items()
            ),
            shares=self._shares,
            ended_leader=None
            if frozen.number == frozen.pid
            else EndedLeader(stat.exit_code, stat.comm),
        )


@attrs.frozen(repr=False)
class _UnderWay:
    """What is asked of one thread."""

    arena: Arena
    task: Task
    asked: list[_Asked]


def finish_all(capturing: Mapping[Pid, Capturing], arenas: Iterable[Arena]) -> list[ProcessImage]:
    """Run the remote calls of all processes, a round on all of their threads at a time.

    Args:
        capturing: of each process, in the order of the images.
        arenas: one in each of them.

    Raises:
        TargetGone, TargetDamaged: of the first process that this became of; or whatever a capture
            raises.
    """
    under_way = [one for arena in arenas for one in capturing[arena.pid].under_way(arena)]
    problem: CkptError | None = None
    while under_way:
        batches = [
            Asked(one.arena, one.task, [call for asked in one.asked for call in asked.calls])
            for one in under_way
        ]
        answers = iter(try_on_all([batch for batch in batches if batch.calls]))
        still: list[_UnderWay] = []
        for one, batch in zip(under_way, batches, strict=True):
            answer = next(answers) if batch.calls else ()
            if isinstance(answer, CkptError):
                # The others are asked to the end: they may have something to put back.
                problem = problem or answer
                continue
            going_on = _answer(one.asked, answer)
            if going_on:
                still.append(_UnderWay(one.arena, one.task, going_on))
        under_way = still
    if problem is not None:
        raise problem
    return [one.image() for one in capturing.values()]


def _begin(resource: Resource[Any], stopped: Stopped) -> _Asked:
    capture = resource.capture(stopped)
    return _Asked(resource.name, capture, next(capture))


def _answer(all_of: list[_Asked], replies: Sequence[Reply]) -> list[_Asked]:
    """Give each capture its replies; return those that ask for more."""
    going_on = []
    at = 0
    for one in all_of:
        end = at + len(one.calls)
        try:
            one.calls = one.capture.send(part_of(replies, at, end))
            going_on.append(one)
        except StopIteration as stop:
            one.record = stop.value
        at = end
    return going_on


def _records_of(asked: Iterable[_Asked]) -> dict[str, Any]:
    return {one.name: one.record for one in asked}
