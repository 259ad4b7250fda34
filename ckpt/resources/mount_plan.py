"""How the mounts of a namespace come about from a copy of another one: pure.

    ours    /   /proc   /data           theirs  /   /proc   /tmp (of /, root /srv/private)
    plan    absent /data, bind /srv/private on /tmp

Both lists are of /proc/PID/mountinfo. Mounts of the same file system and directory at the same path
are the same one; of several at one path the first are at the bottom.
"""

from collections.abc import Iterator, Sequence

import attrs

from ckpt.errors import Finding
from ckpt.kernel.procfs.mountinfo import Mount, covers, find_mount

BIND, NEW, ABSENT, CHANGED = "bind", "new", "absent", "changed"
_KINDS = (BIND, NEW, ABSENT, CHANGED)
_RECREATED = frozenset({"proc", "sysfs", "tmpfs", "mqueue"})
"""File systems that are the same whenever they are mounted; a tmpfs if there is nothing in it."""
_OPTIONS = ("size=", "nr_inodes=", "mode=", "uid=", "gid=", "huge=", "hidepid=", "subset=")
"""Options of those that mount(2) takes as /proc shows them."""
_STATE = "/run/ckpt"
"""Where epochs are (`tracker.epoch`): it must be the same directory in both namespaces."""
_REMEDY = "run ckpt inside that namespace (nsenter --mount)"


@attrs.frozen(slots=True, repr=False)
class MountRecord:
    """One step from the copy to what the tree has."""

    kind: str
    """`bind`, `new`, `absent` (in the copy, and to be taken away), `changed` (in its options)."""
    path: str
    source: str
    """What is bound: a path of the namespace that was copied."""
    fs_type: str
    options: tuple[str, ...]
    """Of this mount."""
    data: str
    """Of a new file system."""

    def __attrs_post_init__(self) -> None:
        """Refuse what no step can be."""
        if self.kind not in _KINDS or not self.path.startswith("/"):
            raise ValueError(f"nothing can be done as {self.kind!r} at {self.path!r}")
        if any("\0" in text for text in (self.path, self.source, self.data)):
            raise ValueError("a path or an option of a mount is cut by a zero byte")
        if self.kind == BIND and not self.source.startswith("/"):
            raise ValueError(f"{self.source!r} cannot be bound")
        if self.kind == NEW and self.fs_type not in _RECREATED:
            raise ValueError(f"no {self.fs_type!r} is mounted anew")


@attrs.frozen(slots=True, repr=False)
class MountPlan:
    """All steps, in their order, and what cannot be reached by any."""

    steps: tuple[MountRecord, ...]
    findings: tuple[Finding, ...]


def plan_mounts(ours: Sequence[Mount], theirs: Sequence[Mount]) -> MountPlan:
    """Return how a copy of `ours` becomes `theirs`.

    What is in a new tmpfs is not known here: see `mounts`.
    """
    same = _pair(ours, theirs)
    gone = [one for one in ours if one.id not in {here.id for here, _ in same}]
    kept = {there.id for _, there in same}
    # What is mounted below goes first.
    gone = sorted(gone, key=lambda one: -len(one.path))
    steps = [_absent(one) for one in gone]
    findings = [_hides(one) for one in gone if covers(one.path, _STATE)]
    made: set[tuple[int, int]] = set()
    for one in theirs:
        if one.id in kept:
            continue
        step = _step_to(one, ours, made)
        if isinstance(step, MountRecord):
            steps.append(step)
        else:
            findings.append(step)
    for here, there in same:
        if set(here.options) != set(there.options):
            steps.append(MountRecord(CHANGED, there.path, "", "", there.options, ""))
    return MountPlan(tuple(steps), tuple(findings))


def _pair(ours: Sequence[Mount], theirs: Sequence[Mount]) -> list[tuple[Mount, Mount]]:
    """Return the mounts that are the same, from the bottom of each path on."""
    stacks: dict[str, tuple[list[Mount], list[Mount]]] = {}
    for side, mounts in enumerate((ours, theirs)):
        for one in mounts:
            stacks.setdefault(one.path, ([], []))[side].append(one)
    return [pair for stack in stacks.values() for pair in _iter_same(*stack)]


def _iter_same(ours: list[Mount], theirs: list[Mount]) -> Iterator[tuple[Mount, Mount]]:
    for here, there in zip(ours, theirs, strict=False):
        if (here.dev, here.root, here.fs_type) != (there.dev, there.root, there.fs_type):
            return
        yield here, there


def _absent(mount: Mount) -> MountRecord:
    return MountRecord(ABSENT, mount.path, "", "", (), "")


def _step_to(
    mount: Mount, ours: Sequence[Mount], made: set[tuple[int, int]]
) -> MountRecord | Finding:
    if covers(mount.path, _STATE):
        return _hides(mount)
    source = _find_source(mount, ours)
    if source is not None and "idmapped" not in mount.options:
        return MountRecord(BIND, mount.path, source, "", mount.options, "")
    if mount.fs_type in _RECREATED and mount.root == "/" and mount.dev not in made:
        made.add(mount.dev)
        data = ",".join(one for one in mount.fs_options if one.startswith(_OPTIONS))
        return MountRecord(NEW, mount.path, "", mount.fs_type, mount.options, data)
    what = f"is a mount ({mount.fs_type}, {mount.root}) that is nowhere where ckpt runs"
    return Finding(f"mount {mount.path}", f"{what}, which is not supported", _REMEDY)


def _hides(mount: Mount) -> Finding:
    text = f"is another mount than where ckpt runs, and {_STATE} is below it"
    return Finding(f"mount {mount.path}", text, _REMEDY)


def _find_source(mount: Mount, ours: Sequence[Mount]) -> str | None:
    """Return a path of ours under which the same directory, or file, is seen."""
    for one in ours:
        if one.dev == mount.dev and covers(one.root, mount.root):
            below = mount.root[len(one.root.rstrip("/")) :]
            path = one.path.rstrip("/") + below or "/"
            if find_mount(ours, path) is one:
                return path
    return None
