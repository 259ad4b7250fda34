"""What every resource file has in common: how it is asked, and what it is given.

A resource is one kind of kernel object: a frozen record (what the image holds), `capture` (frozen
task -> record) and `restore` (record -> remote calls), side by side in one file. Both are
generators: they *yield* the remote calls that they need and are sent the replies. So the engine
can run the calls of all resources of a process, or of a thread, as one batch:

    def capture(process):
        replies = yield [call(NR.getitimer, ITIMER_REAL, Out(32))]
        return TimersRecord(...)

What can be read from outside (/proc, pidfd_getfd) is read in the generator directly.

While it does that, the target stands still. So the work is cut in three:

    look       the target runs      whatever is slow: its result is noted (`Target.notes`)
    capture    it is frozen         asks whether that still holds, and takes the rest
    Later      it runs again        parsing, sorting, building records; then `settle`

Nothing that was seen while the target ran goes into a record unless it was seen again, or proved,
while it was frozen: each `look` that notes something says beside it how `capture` confirms it.
What does not hold is read anew; a target that changes costs time, not truth.

A resource is of a process or of a thread. Restores run in the order of `Stage`, and within a stage
in the order of the registry.
"""

import contextlib
import enum
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import attrs

from ckpt.errors import Finding, RestoreFailed
from ckpt.kernel.features import Features
from ckpt.kernel.procfs import files as procfs_files
from ckpt.kernel.procfs import status as procfs_status
from ckpt.kernel.procfs.mountinfo import Mount
from ckpt.process.clones import OWN, Common, Shares
from ckpt.process.freezer import Frozen
from ckpt.process.pid_space import Numbers
from ckpt.process.remote import Call, Reply
from ckpt.process.seed import Embryo
from ckpt.process.task import Task
from ckpt.resources.remapping import Mapping as Mapped
from ckpt.tracker.spans import Spans
from ckpt.units import Fd, Pid, RemoteFd, Tid

R = TypeVar("R")


@attrs.frozen(slots=True, eq=False, repr=False)
class Later(Generic[R]):
    """A record for which everything has been read, to be built when the target runs again."""

    build: Callable[[], R]
    """Asks nothing of the target, nor of anything that the target can change."""


Capture = Generator[list[Call], Sequence[Reply], R | Later[R]]
"""Yields remote calls, is sent their replies, returns the record, or what will build it."""

Restore = Generator[list[Call], list[Reply], None]
"""Yields remote calls, is sent their replies."""


class Stage(enum.IntEnum):
    """When a resource is restored; each stage relies on those before it."""

    MEMORY = 0
    """The address space; all later calls run in the arena inside it."""
    SESSION = 1
    """What members of a session inherit from its leader: it leads, and has no other members yet."""
    FILES = 2
    PROCESS = 3
    """What all threads share; before there are other threads."""
    THREAD = 4
    """What each thread has for itself; all threads exist."""
    LATE = 5
    """What must not act or expire before all else stands: timers, queued signals."""
    CREDENTIALS = 6
    """Last: the earlier stages need the privileges."""


@attrs.frozen(slots=True, repr=False)
class CaptureOptions:
    """What the user of a dump may choose that resources want to know."""

    kill: bool = False
    """The tree ends with its dump."""
    ghost_limit_bytes: int = 1 << 20
    """How much of a deleted file may travel in the image."""
    tcp_close: bool = False
    """Connections need not go on: they come back closed."""
    external: Collection[str] = ()
    """What leads outside the tree, and will be given to the restore: names as /proc/PID/fd shows
    them, or `auto`; see `files.outside`."""
    mounts: tuple[Mount, ...] = ()
    """What is mounted where ckpt was started, if it has entered the tree's own mount namespace."""
    departs: bool = False
    """With `kill`: their addresses leave this host too, nothing of its network is held then."""


@attrs.define(slots=True, eq=False, repr=False)
class Tree:
    """The processes of one dump, and what they have in common."""

    pids: tuple[Pid, ...]
    """Those that live, by which they can be asked about (`tree.reachable_as`); the root first, each
    behind its parent."""
    options: CaptureOptions = CaptureOptions()
    notes: dict[str, Any] = attrs.field(factory=dict)
    """As `Target.notes`, for what is looked at once for all processes."""
    numbers: Mapping[Pid, Pid] = attrs.field(factory=dict)
    """The pid of each; another one where its first thread has ended."""
    shares: Mapping[Pid, Shares] = attrs.field(factory=dict)
    """What processes have of another one, of those that do."""
    at_kill: list[Callable[[], None]] = attrs.field(factory=list)
    """Called, with `kill`, once the image is whole and before the tree is ended."""
    at_spared: list[Callable[[], None]] = attrs.field(factory=list)
    """Called to take `at_kill` back: the tree goes on after all."""
    at_moved: list[Callable[[], str]] = attrs.field(factory=list)
    """Called when the tree runs on another host and is gone here; returns what the user must know,
    or an empty text."""
    at_thaw: list[Callable[[], None]] = attrs.field(factory=list)
    """Called right before the tree is let go, or after it was ended, or after a failure."""
    at_end: list[Callable[[], None]] = attrs.field(factory=list)
    """Called when the dump is over, however: what is slow, and not worth a moment of the freeze."""
    at_forgotten: list[Callable[[], None]] = attrs.field(factory=list)
    """Called when what was opened to look is not needed any more; shared as `notes` are."""
    _claimed: set[object] = attrs.field(factory=set)

    def forget(self) -> None:
        """Close what was opened to look; what was noted may not be asked again."""
        run_all(self.at_forgotten)
        self.at_forgotten.clear()

    def shares_of(self, pid: Pid) -> Shares:
        """Return what a process has of another one."""
        return self.shares.get(pid, OWN)

    def memory_owners(self) -> dict[Pid, Pid]:
        """Return who has no memory of his own -> whose he has."""
        return {pid: one.memory for pid, one in self.shares.items() if one.memory}

    def claim(self, key: object) -> bool:
        """Tell whether nobody has asked for `key` yet in this capture.

        What several processes share is recorded once, by whoever claims it, under an id that the
        others refer to.
        """
        is_first = key not in self._claimed
        self._claimed.add(key)
        return is_first

    def begin_capture(self) -> None:
        """Give back all claims."""
        self._claimed.clear()


def run_all(hooks: Iterable[Callable[[], None]]) -> None:
    """Call what was noted to be called, in its order."""
    for hook in hooks:
        hook()


def _alone(process: "Target | Stopped") -> Tree:
    return Tree((process.pid,))


@attrs.frozen(slots=True, repr=False)
class Target:
    """A running process, looked at before it is touched."""

    pid: Pid
    features: Features
    notes: dict[str, Any] = attrs.field(factory=dict)
    """What `look` has read and `capture` confirms; by the resource's name."""
    tree: Tree = attrs.Factory(_alone, takes_self=True)
    """To which it belongs; by itself unless given."""


@attrs.frozen(slots=True, repr=False)
class Stopped:
    """A frozen process, and the thread whose state is asked for (the leader, for the process)."""

    frozen: Frozen
    task: Task
    features: Features
    notes: dict[str, Any]
    """See `Target.notes`."""
    tree: Tree = attrs.Factory(_alone, takes_self=True)

    @property
    def pid(self) -> Pid:
        """The process."""
        return self.frozen.pid

    @property
    def tid(self) -> Tid:
        """The thread."""
        return self.task.tid

    @property
    def status_text(self) -> bytes:
        """The thread's /proc/PID/status as it was when first asked for."""
        return self.task.status_text

    def read_status(self) -> procfs_status.Status:
        """Return the same, parsed."""
        return self.task.status

    def read_file(self, name: str) -> bytes:
        """Return /proc/PID/`name`, which was read with all that `Resource.reads` name, or is now.

        Raises:
            TargetGone: the process ended.
            NotPermitted: the file may not be opened.
        """
        text = self.frozen.texts.get(name)
        return procfs_files.read_bytes(self.pid, name) if text is None else text


Instead = int | str
"""What stands for something: a descriptor of ours, or a path to open."""


def _several(
    external: Mapping[str, Instead | tuple[Instead, ...]],
) -> dict[str, tuple[Instead, ...]]:
    """Return the same with tuples only, and one name for each thing."""
    return {
        f"socket:{key.removeprefix('unix:')}" if key.startswith("unix:[") else key: (
            one if isinstance(one, tuple) else (one,)
        )
        for key, one in external.items()
    }


def be_silent(_text: str) -> None:
    """Stand for a caller that wants no warnings."""


@attrs.frozen(slots=True)
class RestoreOptions:
    """What the user of a restore may choose."""

    allow_changed: frozenset[str] = frozenset()
    """Paths that may differ from what they were."""
    inherit: Mapping[int, Instead] = attrs.field(factory=dict)
    """Descriptor number of the root -> what is there instead of what was."""
    external: Mapping[str, tuple[Instead, ...]] = attrs.field(factory=dict, converter=_several)
    """What led outside the tree, by the name that it had -> what is there now; more than one for
    what has two ends. See `files.instead`."""
    tcp_close: bool = False
    """TCP connections come back closed, as if the peers had ended them."""
    no_cgroups: bool = False
    """Processes stay in the restorer's control groups."""
    new_pids: bool = False
    """The tree gets a pid namespace of its own, so it may have numbers that are taken here."""
    warn: Callable[[str], None] = be_silent
    """Tells the user of something that is not exactly as it was."""
    on_arrival: str = ""
    """A command that is run once no packet of a connection of the tree is answered any more, and
    before this host is looked at: it may give it the addresses of the tree."""
    on_return: str = ""
    """A command that takes back what `on_arrival` did, if that has begun and the tree will not run
    here after all; run when nothing of it is left, and its packets are still not answered."""
    addresses_come: bool = False
    """This host is only looked at, and will have the addresses of the tree when that comes."""
    original_stands: bool = False
    """The processes that the image is of still live, on another host, and will end before what is
    restored runs: what is theirs alone is not in the way."""
    original_is_near: bool = False
    """And that host has this very kernel: what exists once in a kernel is the same for both."""
    contents: Mapping[str, str] = attrs.field(factory=dict)
    """Files that the restorer has made, since the image holds their content: by their keys
    (`FileIdentity.content`), and by the names of those that have one; where to open them now."""

    def content_of(self, key: str, path: str) -> str | None:
        """Return where to open what was made for a content, or a name; None: it was not made."""
        return self.contents.get(key or path)


@attrs.frozen(slots=True, repr=False)
class Opened:
    """A descriptor that the restorer opened for the restored process to inherit."""

    fd: Fd
    at_last: Callable[[], None] | None = None
    """Called when everything is built, right before the first thread is let go."""
    shared: bool = False
    """All processes need it, under a key that is unique in the tree; else it is its process's."""


@attrs.define(slots=True, eq=False, repr=False)
class Opening:
    """What belongs together while the files of a tree are opened in the restorer."""

    options: RestoreOptions
    stack: contextlib.ExitStack
    """Closes what is needed only until all are open."""
    made: dict[tuple[str, int], Any] = attrs.field(factory=dict)
    """Name of the kind, number of the object -> what that kind has made of it (a pipe: both ends),
    for all descriptions that belong to it."""
    embryos: Mapping[Pid, Embryo] = attrs.field(factory=dict)
    """Processes of the tree that are there already, by their numbers: nobody else can be them."""
    at_last: list[Callable[[], None]] = attrs.field(factory=list)
    """Called when everything is built, right before the first thread is let go."""
    at_go: list[Callable[[], None]] = attrs.field(factory=list)
    """Called after `at_last`, when nothing can fail any more but what is seen: takes away what a
    failure would have needed. Raises nothing."""
    at_failure: list[Callable[[], None]] = attrs.field(factory=list)
    """Called, before `at_end`, if the restore fails at whatever step: takes away what others see,
    names of files above all. Raises nothing."""
    at_end: list[Callable[[], None]] = attrs.field(factory=list)
    """Called when the restore is over, however."""


@attrs.frozen(slots=True, repr=False)
class Rebuilt:
    """A process under construction, and the thread whose state is put back."""

    embryo: Embryo
    task: Task
    features: Features
    inherited: Mapping[str, RemoteFd]
    """What `Resource.prepare` opened, under its keys; the numbers in the embryo."""
    fill: Callable[[Spans], None]
    """Writes the pages of the image into the mapped, still writable memory; is told what of
    `mapped` was kept. All other mappings are new."""
    warn: Callable[[str], None]
    """Tells the user of something that is not exactly as it was."""
    mapped: Sequence[Mapped] = ()
    """What of its memory it has already and may keep, see `memory.mappings_of`."""
    seen_as: Mapping[int, Pid] = attrs.field(factory=dict)
    """Number of a process in the image -> the one that we see, where that is another."""

    @property
    def pid(self) -> Pid:
        """The process, as we see it."""
        return self.embryo.pid

    @property
    def number(self) -> Pid:
        """The process, as the tree and its image know it."""
        return self.embryo.number


def no_findings(_target: Target) -> Iterable[Finding]:
    """Stand for a resource that is always supported."""
    return ()


def nothing_more(_record: object, _rebuilt: Rebuilt) -> Restore:
    """Stand for a resource that `restore` puts back completely."""
    yield []


def nothing_to_open(_record: object, _opening: Opening) -> dict[str, Opened]:
    """Stand for a resource that needs no descriptor of the restorer."""
    return {}


def nothing_to_expect(_record: object, _opening: "Opening") -> None:
    """Stand for a resource that nobody outside can ask for before it is there."""


def as_it_is(record: R) -> R:
    """Stand for a resource whose record is complete when it is captured."""
    return record


def without_numbers(record: R, _numbers: Numbers) -> R:
    """Stand for a resource whose record names no process, or as the tree itself does."""
    return record


def files_fit(_record: object, _options: RestoreOptions) -> Iterable[Finding]:
    """Stand for a resource that does not depend on files."""
    return ()


def host_fits(_record: object, _features: Features) -> Iterable[Finding]:
    """Stand for a resource that every host can give."""
    return ()


@attrs.frozen(slots=True, repr=False)
class Resource(Generic[R]):
    """One kind of kernel object; the registry lists all of them."""

    name: str
    """Its key in the manifest."""
    record: type[R]
    stage: Stage
    capture: Callable[[Stopped], Capture[R]]
    restore: Callable[[R, Rebuilt], Restore]
    reads: tuple[str, ...] = ()
    """Files below /proc/PID, of less than a page, that its capture wants (`Stopped.read_file`): all
    of them are opened before the freeze and read in one go. Which may not be: see `HeldFiles`."""
    common: Common | None = None
    """The object that it is about, if processes may share that: what is another's is recorded and
    restored there."""
    finish: Callable[[R, Rebuilt], Restore] = nothing_more
    """Of a process: what children must not inherit, when all have been born."""
    look: Callable[[Target], Iterable[Finding]] = no_findings
    settle: Callable[[R], R] = as_it_is
    """Completes a record after the thaw, by what needs no frozen target."""
    renumber: Callable[[R, Numbers], R] = without_numbers
    """Puts the tree's own numbers for those that we see, of a tree in another pid namespace."""
    check_files: Callable[[R, RestoreOptions], Iterable[Finding]] = files_fit
    """Names the files that are missing or changed, before anything is started."""
    check_host: Callable[[R, Features], Iterable[Finding]] = host_fits
    """Names what this host lacks, before anything is started."""
    expect: Callable[[R, Opening], None] = nothing_to_expect
    """Keeps others from an answer (of the network) before it is there; what comes first of all."""
    prepare: Callable[[R, Opening], dict[str, Opened]] = nothing_to_open
    """Opens, in the restorer, what the embryo must inherit."""

    def complete(self, captured: R | Later[R]) -> R:
        """Return the record that a capture was for; after the thaw."""
        return self.settle(captured.build() if isinstance(captured, Later) else captured)


def expect(step: str, replies: Iterable[Reply]) -> None:
    """Take only success from a restore's calls.

    Raises:
        RestoreFailed: with the first call that the kernel refused.
    """
    for reply in replies:
        if not reply.ok:
            raise RestoreFailed(step, str(reply))
