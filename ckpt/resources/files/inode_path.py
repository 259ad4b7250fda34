"""Under which name an inode is found that only the kernel has at hand: what inotify watches.

    handle   open_by_handle_at(2) opens it, and /proc/self/fd/N tells its name
    search   where the file system gives no handles that can be opened (overlayfs, /proc, /sys), or
             the kernel has forgotten the name: down from the mount points, level by level

What was found is looked at again under its name: it must be that very inode.

Kernel: /proc/PID/mountinfo, open_by_handle_at(2). The handle of a file (not of a directory) leads
to a name only while the kernel has that in its cache. A search ends after `SEARCHED_ENTRIES`.
"""

import contextlib
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator

import attrs

from ckpt.kernel.handles import open_by_handle_at
from ckpt.kernel.procfs.fdinfo import read_fdinfo
from ckpt.kernel.procfs.mountinfo import Mount, read_mountinfo
from ckpt.units import Pid, RemoteFd

SEARCHED_ENTRIES = 100_000


@attrs.frozen(slots=True)
class Inode:
    """An inode of a file system that is mounted."""

    dev_major: int
    dev_minor: int
    number: int
    handle_type: int | None = None
    """With `handle`, what open_by_handle_at(2) takes; None where the file system has none."""
    handle: bytes | None = None


def find_paths(inodes: Iterable[Inode]) -> dict[Inode, str]:
    """Return a name of each that has one."""
    found: dict[Inode, str] = {}
    by_device: dict[tuple[int, int], list[Inode]] = {}
    for inode in inodes:
        by_device.setdefault((inode.dev_major, inode.dev_minor), []).append(inode)
    if not by_device:
        return found
    all_mounts = read_mountinfo(Pid(os.getpid()))
    for device, wanted in by_device.items():
        # Those that show the whole file system first: from them every inode can be seen.
        mounts = sorted((m for m in all_mounts if m.dev == device), key=lambda m: m.root != "/")
        for mount in mounts:
            left = [inode for inode in wanted if inode not in found]
            found |= _find_by_handle(mount, left, mounts)
        left = [inode for inode in wanted if inode not in found]
        found |= _search(mounts, {mount.path for mount in all_mounts}, left)
    return found


def _find_by_handle(
    mount: Mount, inodes: Collection[Inode], mounts: Collection[Mount]
) -> dict[Inode, str]:
    found: dict[Inode, str] = {}
    with contextlib.suppress(OSError), _opened(mount.path, os.O_RDONLY) as mount_fd:
        for inode in inodes:
            path = _path_by_handle(mount_fd, inode)
            if path and _is_there(path, inode, mounts):
                found[inode] = path
    return found


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _path_by_handle(mount_fd: int, inode: Inode) -> str:
    """Return the name that the kernel knows; empty if there is none."""
    if inode.handle is None or inode.handle_type is None:
        return ""
    try:
        fd = open_by_handle_at(mount_fd, inode.handle_type, inode.handle, os.O_PATH)
    except OSError:
        return ""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _is_there(path: str, inode: Inode, mounts: Collection[Mount]) -> bool:
    """Tell whether the inode is what is found under the path."""
    try:
        with _opened(path, os.O_PATH | os.O_NOFOLLOW) as fd:
            status = os.fstat(fd)
            if status.st_ino != inode.number:
                return False
            if status.st_dev == os.makedev(inode.dev_major, inode.dev_minor):
                return True
            # Some file systems (overlayfs, btrfs) tell another device than the one that they are.
            info = read_fdinfo(Pid(os.getpid()), RemoteFd(fd))
            return info is not None and info.mnt_id in {mount.id for mount in mounts}
    except OSError:
        return False


def _search(
    mounts: Collection[Mount], other_mounts: Collection[str], inodes: Collection[Inode]
) -> dict[Inode, str]:
    found: dict[Inode, str] = {}
    left = {inode.number: inode for inode in inodes}
    entries = iter_entries((mount.path for mount in mounts), other_mounts) if left else iter(())
    for number, path in entries:
        inode = left.get(number)
        if inode is not None and _is_there(path, inode, mounts):
            found[inode] = path
            del left[number]
            if not left:
                break
    return found


def iter_entries(starts: Iterable[str], mounts: Collection[str]) -> Iterator[tuple[int, str]]:
    """Yield inode number and path of what is there, level by level, within one file system.

    What several starts have in common comes several times; after `SEARCHED_ENTRIES` it ends.
    """
    folders = deque(starts)
    for path in folders:
        with contextlib.suppress(OSError):
            yield os.lstat(path).st_ino, path
    n_seen = 0
    while folders and n_seen < SEARCHED_ENTRIES:
        with contextlib.suppress(OSError), os.scandir(folders.popleft()) as entries:
            for entry in entries:
                n_seen += 1
                if entry.path not in mounts:
                    yield entry.inode(), entry.path
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
