"""Control groups: in which group of each hierarchy (version 1 and 2) a process is.

Kernel: /proc/PID/cgroup, /proc/self/mountinfo; cgroup.procs, into which a process writes 0 to join
(kernel/cgroup/cgroup.c): so it needs no number that is the same everywhere. The files are opened
by the restorer, whose rights count, and inherited. It joins before its memory is filled, which is
then charged to its own group.

- Only membership is captured: groups are not made, and nothing of theirs is set.
- A control group namespace that the root has of its own is made anew: by the root itself, in the
  groups that are the tops of that namespace, before its children are born into it.
- Paths are those that ckpt's cgroup namespace shows.
- A group that the process was removed from under its feet (deleted) is not gone back to.
- Refused before anything is touched: threads in other groups than their process; a process that
  was moved out of what its namespace shows; one in another namespace than the root (`identity`).
- Refused before anything is started: a group that is missing, frozen, or that we may not write to,
  if we are not in it ourselves; unless `no_cgroups` leaves the process in the restorer's groups.
"""

import os
from _thread import get_native_id
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from ckpt.errors import Finding, RestoreFailed, TargetGone, UnsupportedState
from ckpt.kernel.arch import NR
from ckpt.kernel.namespaces import Namespace, inside, read_namespace
from ckpt.kernel.procfs import files as procfs_files
from ckpt.kernel.procfs.cgroups import (
    Hierarchy,
    Membership,
    directory_of,
    parse_cgroup,
    parse_hierarchies,
)
from ckpt.kernel.procfs.held import HeldFiles
from ckpt.process.remote import In, call
from ckpt.resources.base import (
    Capture,
    Later,
    Opened,
    Opening,
    Rebuilt,
    Resource,
    Restore,
    RestoreOptions,
    Stage,
    Stopped,
    Target,
    expect,
)
from ckpt.units import Fd, Pid, Tid

_NOTE = "control group"
_REMEDY = "make it, or leave the process in ckpt's own groups with --no-cgroups"


@attrs.frozen(slots=True, repr=False)
class GroupRecord:
    """One group."""

    hierarchy: str
    """See `procfs.cgroups.Membership`."""
    path: str

    def __attrs_post_init__(self) -> None:
        """Refuse a path that leads elsewhere."""
        if not self.path.startswith("/") or ".." in self.path.split("/") or "\0" in self.path:
            raise ValueError(f"{self.path!r} is no path of a control group")


@attrs.frozen(slots=True, repr=False)
class CgroupsRecord:
    """The groups of a process."""

    groups: tuple[GroupRecord, ...]
    tops: tuple[GroupRecord, ...] = ()
    """What the root sees as `/` of each hierarchy, if it has a namespace of its own."""


def look(target: Target) -> Iterator[Finding]:
    """Name threads that are in other groups than their process."""
    pid = target.pid
    own = procfs_files.read_bytes(pid, "cgroup")
    for tid in procfs_files.list_tids(pid):
        if tid == Tid(pid):
            continue
        try:
            theirs = procfs_files.read_bytes(pid, f"task/{tid}/cgroup")
        except TargetGone:
            continue
        if theirs != own:
            yield Finding(
                f"thread {tid}",
                "is in another control group than its process, which is not supported",
            )
    held = target.notes[_NOTE] = HeldFiles(pid, ["cgroup"])
    target.tree.at_forgotten.append(held.close)
    if target.pid == target.tree.pids[0]:
        try:
            _read_tops(pid)
        except _OutOfSight as problem:
            yield Finding(f"process {pid}", str(problem), "run ckpt inside that namespace")


class _OutOfSight(Exception):
    """Tells why a namespace cannot be made anew."""


def _read_tops(pid: Pid) -> tuple[GroupRecord, ...]:
    """Return the groups that a process sees as `/`, by our paths; nothing if it sees what we see.

    Raises:
        _OutOfSight: they cannot be told, or it is not in or below them.
    """
    try:
        if read_namespace(pid, "cgroup") == read_namespace(Tid(get_native_id()), "cgroup"):
            return ()
    except OSError:  # It ended, or this kernel has no such namespaces.
        return ()
    outer = _record_of(procfs_files.read_text(pid, "cgroup")).groups
    try:
        with inside(pid, "cgroup"):
            inner = parse_cgroup(procfs_files.read_text(pid, "cgroup"))
    except OSError as error:
        what = f"is in another control group namespace than ckpt ({error.strerror})"
        raise _OutOfSight(what) from error
    seen = {one.hierarchy: one.path for one in inner}
    return tuple(GroupRecord(one.hierarchy, _top_of(one, seen[one.hierarchy])) for one in outer)


def _top_of(group: GroupRecord, seen: str) -> str:
    """Return the path of the group under which `group` is seen as `seen`."""
    below = seen.rstrip("/")
    if seen.startswith("/..") or not group.path.rstrip("/").endswith(below):
        what = f"is in the control group {group.path}, which its own namespace does not show"
        raise _OutOfSight(f"{what}, not supported")
    return group.path.rstrip("/").removesuffix(below) or "/"


def capture(stopped: Stopped) -> Capture[CgroupsRecord]:
    """Read where the process is now."""
    held: HeldFiles | None = stopped.notes.get(_NOTE)
    raw = held.read().get("cgroup") if held else None
    text = procfs_files.read_bytes(stopped.pid, "cgroup") if raw is None else raw
    tops = _tops_of(stopped)
    yield []
    return Later(lambda: attrs.evolve(_record_of(procfs_files.decode(text)), tops=tops))


def _tops_of(stopped: Stopped) -> tuple[GroupRecord, ...]:
    if stopped.pid != stopped.tree.pids[0]:
        return ()
    try:
        return _read_tops(stopped.pid)
    except _OutOfSight as problem:
        finding = Finding(f"process {stopped.pid}", str(problem))
        raise UnsupportedState(stopped.pid, (finding,)) from problem


def _record_of(text: str) -> CgroupsRecord:
    return CgroupsRecord(
        tuple(
            GroupRecord(one.hierarchy, one.path)
            for one in parse_cgroup(text)
            # A group outside of our namespace begins with "/..": nobody there can name it.
            if not one.deleted and not one.path.startswith("/..")
        )
    )


def _elsewhere(record: CgroupsRecord) -> Iterator[GroupRecord]:
    """Yield the groups that the embryo must join: it is where we are, or under its own top."""
    ours = _record_of(procfs_files.read_text(Pid(os.getpid()), "cgroup")).groups
    here = {one.hierarchy: one for one in ours} | {one.hierarchy: one for one in record.tops}
    yield from (group for group in record.tops if group not in ours)
    yield from (group for group in record.groups if here.get(group.hierarchy) != group)


def _read_hierarchies() -> dict[str, Hierarchy]:
    return parse_hierarchies(procfs_files.read_text(Pid(os.getpid()), "mountinfo"))


def _find(group: GroupRecord, hierarchies: dict[str, Hierarchy]) -> Path | None:
    found = directory_of(Membership(group.hierarchy, group.path, deleted=False), hierarchies)
    return None if found is None else Path(found)


def check_files(record: CgroupsRecord, options: RestoreOptions) -> Iterator[Finding]:
    """Name the groups that the process cannot be put into."""
    if options.no_cgroups:
        return
    hierarchies = _read_hierarchies()
    for group in _elsewhere(record):
        problem = _problem(_find(group, hierarchies))
        if problem:
            kind = group.hierarchy or "version 2"
            yield Finding(f"control group {group.path} ({kind})", problem, _REMEDY)


def _problem(directory: Path | None) -> str:
    if directory is None:
        return "no mount shows this hierarchy"
    if not directory.is_dir():
        return "is not there"
    if not os.access(directory / "cgroup.procs", os.W_OK):
        return "ckpt may not put processes into it"
    return "is frozen" if _is_frozen(directory) else ""


def _is_frozen(directory: Path) -> bool:
    """Tell whether what joins a group stops at once (version 2, or the freezer of version 1)."""
    for name, sign in (("cgroup.freeze", "1"), ("freezer.state", "FROZEN")):
        try:
            if (directory / name).read_text(encoding="ascii").strip() == sign:
                return True
        except OSError:
            continue
    return False


def prepare(record: CgroupsRecord, opening: Opening) -> dict[str, Opened]:
    """Open the groups that the process is to join."""
    opened: dict[str, Opened] = {}
    if opening.options.no_cgroups:
        return opened
    hierarchies = _read_hierarchies()
    for group in _elsewhere(record):
        directory = _find(group, hierarchies)
        try:
            if directory is None:
                raise FileNotFoundError(group.path)
            fd = os.open(directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            _close(opened)
            raise RestoreFailed(f"opening control group {group.path}", str(error)) from error
        opened[_key(group)] = Opened(Fd(fd))
    return opened


def _close(opened: dict[str, Opened]) -> None:
    for one in opened.values():
        os.close(one.fd)


def _key(group: GroupRecord) -> str:
    return f"cgroup {group.hierarchy}:{group.path}"


def restore(record: CgroupsRecord, rebuilt: Rebuilt) -> Restore:
    """Join the groups that were opened."""
    if record.tops:
        yield from _join(record.tops, rebuilt)
        expect("making a control group namespace", (yield [_UNSHARE]))
    yield from _join(record.groups, rebuilt)
    _bring_back(record, rebuilt.pid)


_UNSHARE = call(NR.unshare, Namespace.CGROUP)


def _join(groups: Iterable[GroupRecord], rebuilt: Rebuilt) -> Restore:
    joined = [group for group in groups if _key(group) in rebuilt.inherited]
    replies = yield [
        call(NR.write, rebuilt.inherited[_key(group)], In(b"0\n"), 2) for group in joined
    ]
    for group, reply in zip(joined, replies, strict=True):
        if not reply.ok:
            raise RestoreFailed(f"joining control group {group.path}", str(reply))


def _bring_back(record: CgroupsRecord, pid: Pid) -> None:
    """Move a process into those of its groups that we are in, if its parent had left them."""
    here = _record_of(procfs_files.read_text(pid, "cgroup")).groups
    ours = _record_of(procfs_files.read_text(Pid(os.getpid()), "cgroup")).groups
    left = [group for group in record.groups if group in ours and group not in here]
    hierarchies = _read_hierarchies() if left else {}
    for group in left:
        directory = _find(group, hierarchies)
        try:
            if directory is None:
                raise FileNotFoundError(group.path)
            (directory / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError as error:
            raise RestoreFailed(f"joining control group {group.path}", str(error)) from error


CGROUPS = Resource(
    "cgroups",
    CgroupsRecord,
    Stage.MEMORY,
    capture=capture,
    restore=restore,
    look=look,
    check_files=check_files,
    prepare=prepare,
)
