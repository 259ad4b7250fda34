"""The mount namespace of a tree, if its root has one of its own: a part of `namespaces`.

    dump       ckpt enters it (`beside`): whatever has a path is looked at where that path leads
    restore    ckpt makes a copy of its own, and changes that as the plan in the image says
               (`mounted`); all files are opened in it, the tree is born in it

Captured is how the tree's mounts differ from those where ckpt runs: directories and files of the
host that are bound elsewhere, mounts that are missing, other options (read-only), new proc, sysfs,
mqueue and empty tmpfs. What the host has mounted is expected to be there at the restore.

Kernel: mount_namespaces(7), proc_pid_mountinfo(5), mount(2).

Refused, by the mount point: every other mount, files in a tmpfs of the tree's own, what hides
/run/ckpt; and as a whole a tree with another root file system or without /proc (a container), or
with a /proc of a pid namespace of its own (`unshare --mount-proc`).
Mounts come back private, or as slaves of the host's if its root was one.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

import attrs

from ckpt.errors import Finding, HostMismatch, NotPermitted, RestoreFailed, UnsupportedState
from ckpt.kernel import mounts as kernel
from ckpt.kernel.mounts import MountFlag
from ckpt.kernel.procfs.mountinfo import Mount, find_mount, read_mountinfo
from ckpt.resources.base import Instead, RestoreOptions, Stopped, Target, Tree
from ckpt.resources.mount_plan import ABSENT, BIND, CHANGED, NEW, MountRecord, plan_mounts
from ckpt.units import Pid

_STEP = "making a mount namespace"


@attrs.frozen(slots=True, repr=False)
class MountsRecord:
    """How the root's mounts differ from those where ckpt ran; of other processes: nothing."""

    own: bool
    follows: bool
    """What is mounted on the host later appears in it."""
    steps: tuple[MountRecord, ...]


NOTHING = MountsRecord(own=False, follows=False, steps=())


@contextlib.contextmanager
def beside(pid: Pid) -> Iterator[tuple[Mount, ...]]:
    """Be in the mount namespace of a process, if that is another one that a restore can make.

    Yields what is mounted where we were, for `CaptureOptions.mounts`; nothing if we are there
    already, or stay out: then `look` says what is wrong.
    """
    try:
        ours, theirs = _read_both(pid)
    except OSError:
        ours = theirs = ()
    if not ours or not _is_like(ours, theirs) or _sees_other_numbers(pid, ours, theirs):
        yield ()
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(kernel.inside(pid))
        except OSError:
            ours = ()
        yield ours


def _read_both(pid: Pid) -> tuple[tuple[Mount, ...], tuple[Mount, ...]]:
    """Return our mounts and theirs; nothing if they are in one namespace."""
    if os.path.samestat(os.stat(f"/proc/{pid}/ns/mnt"), os.stat("/proc/thread-self/ns/mnt")):
        return (), ()
    return tuple(read_mountinfo(Pid(os.getpid()))), tuple(read_mountinfo(pid))


def _is_like(ours: Sequence[Mount], theirs: Sequence[Mount]) -> bool:
    """Tell whether it has our root file system, and shows processes as we see them."""
    here, there, proc = (
        find_mount(ours, "/"),
        find_mount(theirs, "/"),
        find_mount(theirs, "/proc"),
    )
    if here is None or there is None or proc is None:
        return False
    same_root = (here.dev, here.root) == (there.dev, there.root)
    return same_root and proc.fs_type == "proc" and proc.path == "/proc"


def _sees_other_numbers(pid: Pid, ours: Sequence[Mount], theirs: Sequence[Mount]) -> bool:
    """Tell whether its /proc may be one in which processes have other numbers than for us."""
    if os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), os.stat("/proc/thread-self/ns/pid")):
        return False
    here, there = find_mount(ours, "/proc"), find_mount(theirs, "/proc")
    return here is None or there is None or here.dev != there.dev


def reachable(path: str | Path) -> Path:
    """Return a path that leads where `path` does, also when we are in `beside` or `mounted`.

    State: we are in neither.
    """
    resolved = os.path.realpath(path)
    if resolved.startswith("/proc/"):
        # /dev/stdout: whoever opens it, it is theirs.
        return Path(path)
    try:
        return Path(os.path.relpath(resolved))
    except OSError:  # Our working directory is gone.
        return Path(path)


def reachable_instead(options: RestoreOptions) -> RestoreOptions:
    """Return options in which all that the user has named by a path is found from `mounted`."""

    def found(one: Instead) -> Instead:
        return one if isinstance(one, int) else str(reachable(one))

    return attrs.evolve(
        options,
        inherit={fd: found(one) for fd, one in options.inherit.items()},
        external={key: tuple(map(found, several)) for key, several in options.external.items()},
    )


def look(target: Target) -> Iterator[Finding]:
    """Name the mounts that a restore could not make."""
    if target.pid == target.tree.pids[0] and target.tree.options.mounts:
        yield from _plan(target.pid, target.tree)[1]


def _plan(pid: Pid, tree: Tree) -> tuple[MountsRecord, list[Finding]]:
    theirs = read_mountinfo(pid)
    plan = plan_mounts(tree.options.mounts, theirs)
    findings = list(plan.findings)
    for step in plan.steps:
        problem = _problem_of_new(step, theirs) if step.kind == NEW else ""
        if problem:
            findings.append(Finding(f"mount {step.path}", problem))
    root = find_mount(theirs, "/")
    return MountsRecord(True, root is not None and root.follows, plan.steps), findings


def _problem_of_new(step: MountRecord, theirs: Sequence[Mount]) -> str:
    """Tell what of a file system of the tree's own would be lost. We are where it is seen."""
    if step.fs_type != "tmpfs":
        return ""
    seen = find_mount(theirs, step.path)
    try:
        status, names = os.stat(step.path), os.listdir(step.path)
    except OSError as error:
        return f"is a tmpfs that cannot be looked into ({error.strerror})"
    if seen is None or (os.major(status.st_dev), os.minor(status.st_dev)) != seen.dev:
        return "is a tmpfs that another mount hides, which is not supported"
    if names:
        return f"is a tmpfs with {len(names)} files in it, which is not supported yet"
    return ""


def read_record(stopped: Stopped) -> MountsRecord:
    """Read the mounts of the root from outside; of another process nothing.

    Raises:
        UnsupportedState: something was mounted, or written there, after `look`.
    """
    if stopped.pid != stopped.tree.pids[0] or not stopped.tree.options.mounts:
        return NOTHING
    record, findings = _plan(stopped.pid, stopped.tree)
    if findings:
        raise UnsupportedState(stopped.pid, tuple(findings))
    return record


@contextlib.contextmanager
def mounted(record: MountsRecord) -> Iterator[None]:
    """Have this thread, and all that it starts, in a mount namespace as that of the record.

    Raises:
        HostMismatch: directories or files that are to be bound are not there; all of them.
        NotPermitted: we may not make it.
        RestoreFailed: the kernel refused something else.
    """
    with contextlib.ExitStack() as stack:
        if record.own:
            try:
                stack.enter_context(kernel.copied(follows=record.follows))
            except PermissionError as error:
                raise NotPermitted("make a mount namespace", "run ckpt as root") from error
            except OSError as error:
                raise RestoreFailed(_STEP, error.strerror or str(error)) from error
            _furnish(record.steps)
            stack.callback(_inside.reset, _inside.set(record))
        yield


_inside: ContextVar[MountsRecord] = ContextVar("mount namespace that was made", default=NOTHING)


def refuse_elsewhere(record: MountsRecord) -> None:
    """Refuse to go on where `mounted` was not asked for what a tree has.

    Raises:
        RestoreFailed: it would be born into our own mount namespace.
    """
    if record.own and _inside.get() is not record:
        raise RestoreFailed(_STEP, "the tree has one of its own, which is not supported here")


def _furnish(steps: Sequence[MountRecord]) -> None:
    with contextlib.ExitStack() as stack:
        sources: dict[MountRecord, int] = {}
        missing: list[Finding] = []
        for step in steps:
            if step.kind != BIND:
                continue
            # Before anything is mounted over it.
            try:
                sources[step] = os.open(step.source, os.O_PATH | os.O_CLOEXEC)
                stack.callback(os.close, sources[step])
            except OSError as error:
                text = f"showed {step.source}, which is not there ({error.strerror})"
                missing.append(Finding(f"mount {step.path}", text, "make it again"))
        if missing:
            raise HostMismatch(tuple(missing))
        for step in steps:
            try:
                _take(step, sources.get(step, -1))
            except OSError as error:
                what = f"{_STEP}: {step.kind} {step.path}"
                raise RestoreFailed(what, error.strerror or str(error)) from error


def _take(step: MountRecord, source: int) -> None:
    flags = kernel.flags_of(step.options)
    if step.kind == ABSENT:
        kernel.umount(step.path)
    elif step.kind == NEW:
        kernel.mount(step.fs_type, step.path, step.fs_type, flags, step.data)
    elif step.kind == BIND:
        kernel.mount(f"/proc/self/fd/{source}", step.path, "", MountFlag.BIND)
    if step.kind in (BIND, CHANGED):
        kernel.mount("", step.path, "", MountFlag.REMOUNT | MountFlag.BIND | flags)
