"""/proc/PID/cgroup and where the hierarchies are mounted: in which control groups a task is.

Source: cgroups(7), Documentation/admin-guide/cgroup-v2.rst, proc_pid_mountinfo(5).
"""

import re

import attrs

_DELETED = " (deleted)"
_ESCAPE = re.compile(r"\\([0-7]{3})")


@attrs.frozen(slots=True, repr=False)
class Membership:
    """One line of /proc/PID/cgroup."""

    hierarchy: str
    """Its controllers, sorted, with commas between them (`cpu,cpuacct`, `name=systemd`); empty: the
    unified hierarchy of version 2."""
    path: str
    """From the root of our cgroup namespace, beginning with a slash."""
    deleted: bool


def parse_cgroup(text: str) -> tuple[Membership, ...]:
    """Parse /proc/PID/cgroup.

    Raises:
        ValueError: a line is not of the form `ID:CONTROLLERS:PATH`.
    """
    memberships = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        hierarchy = ",".join(sorted(controllers.split(",")))
        deleted = path.endswith(_DELETED)
        memberships.append(Membership(hierarchy, path.removesuffix(_DELETED), deleted))
    return tuple(memberships)


@attrs.frozen(slots=True, repr=False)
class Hierarchy:
    """Where a hierarchy is mounted."""

    root: str
    """Which of its groups is at the top of the mount."""
    mounted_at: str


def parse_hierarchies(text: str) -> dict[str, Hierarchy]:
    """Return the mounted hierarchies of /proc/PID/mountinfo by their names, see `Membership`.

    Of several mounts of one, that with the highest group at its top.
    """
    found: dict[str, Hierarchy] = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(" "), "", ""][:3]
        if kind not in ("cgroup", "cgroup2"):
            continue
        fields = before.split(" ")
        name = "" if kind == "cgroup2" else _name_of(options)
        one = Hierarchy(_unescape(fields[3]), _unescape(fields[4]))
        if name not in found or len(one.root) < len(found[name].root):
            found[name] = one
    return found


_NO_CONTROLLERS = frozenset(
    {"rw", "ro", "xattr", "clone_children", "noprefix", "cpuset_v2_mode", "none", "favordynmods"}
)


def _name_of(options: str) -> str:
    words = options.split(",")
    return ",".join(
        sorted(w for w in words if w not in _NO_CONTROLLERS and not w.startswith("release_agent="))
    )


def _unescape(path: str) -> str:
    """Undo the octal escapes of mountinfo (space, tab, line end, backslash)."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 8)), path)


def directory_of(membership: Membership, hierarchies: dict[str, Hierarchy]) -> str | None:
    """Return the directory of a group, None if no mount shows it."""
    hierarchy = hierarchies.get(membership.hierarchy)
    if hierarchy is None:
        return None
    root = hierarchy.root.rstrip("/")
    if membership.path != root and not membership.path.startswith(f"{root}/"):
        return None
    return hierarchy.mounted_at + membership.path[len(root) :].rstrip("/")
