"""Mount namespaces of this thread, and what is mounted in them.

Who enters a mount namespace gets its root as root and working directory. Here the working directory
is put back: a path relative to it leads where it did, through the mounts of the namespace that the
thread came from. Absolute paths lead through the entered one.

A thread must have root and working directory for itself (CLONE_FS) to enter; other threads of ours
stay where they are, and those that it starts go with it.

Source: mount(2), umount2(2), mount_namespaces(7), setns(2), unshare(2); include/uapi/linux/mount.h.
"""

import contextlib
import enum
import os
from collections.abc import Iterator

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address, syscall
from ckpt.units import Pid

_CLONE_FS, _CLONE_NEWNS = 0x0000_0200, 0x0002_0000


class MountFlag(enum.IntFlag):
    """MS_* flags that a single mount can have, and those that say what mount(2) does."""

    NONE = 0
    RDONLY = 0x1
    NOSUID = 0x2
    NODEV = 0x4
    NOEXEC = 0x8
    REMOUNT = 0x20
    NOSYMFOLLOW = 0x100
    NOATIME = 0x400
    NODIRATIME = 0x800
    BIND = 0x1000
    REC = 0x4000
    PRIVATE = 0x4_0000
    SLAVE = 0x8_0000
    RELATIME = 0x20_0000
    STRICTATIME = 0x100_0000


_BY_OPTION = {
    "ro": MountFlag.RDONLY,
    "nosuid": MountFlag.NOSUID,
    "nodev": MountFlag.NODEV,
    "noexec": MountFlag.NOEXEC,
    "nosymfollow": MountFlag.NOSYMFOLLOW,
    "noatime": MountFlag.NOATIME,
    "nodiratime": MountFlag.NODIRATIME,
    "relatime": MountFlag.RELATIME,
}


def flags_of(options: tuple[str, ...]) -> MountFlag:
    """Return the flags that /proc/PID/mountinfo shows of a mount as options."""
    flags = MountFlag.NONE
    for option in options:
        flags |= _BY_OPTION.get(option, MountFlag.NONE)
    if not flags & (MountFlag.NOATIME | MountFlag.RELATIME):
        flags |= MountFlag.STRICTATIME
    return flags


def mount(source: str, path: str, fs_type: str, flags: MountFlag, data: str = "") -> None:
    """Make a file system, or a directory, be seen at a path (man page in section 2).

    Raises:
        OSError: the kernel refused it.
    """
    texts = [os.fsencode(text) + b"\0" for text in (source, path, fs_type, data)]
    at = [readable_address(text)[0] for text in texts]
    syscall(NR.mount, at[0], at[1], at[2], flags, at[3])


def umount(path: str) -> None:
    """Take away what is mounted last at a path: umount2(2).

    Raises:
        OSError: EBUSY, EINVAL (nothing is mounted there).
    """
    text = os.fsencode(path) + b"\0"
    syscall(NR.umount2, readable_address(text)[0], 0)


@contextlib.contextmanager
def _returning() -> Iterator[int]:
    """Lend the working directory; bring this thread back to where it is in the end."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:

        def hold(path: str, flags: int) -> int:
            fd = os.open(path, flags)
            stack.callback(os.close, fd)
            return fd

        root, cwd = hold("/", flags), hold(".", flags)
        here = hold("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield cwd
        finally:
            # What threads of ours that were started meanwhile share stays theirs.
            syscall(NR.unshare, _CLONE_FS)
            syscall(NR.setns, here, _CLONE_NEWNS)
            os.fchdir(root)
            os.chroot(".")
            os.fchdir(cwd)


@contextlib.contextmanager
def inside(pid: Pid) -> Iterator[None]:
    """Have this thread in the mount namespace of a process for the length of the block.

    Raises:
        OSError: the process ended, or we may not (CAP_SYS_ADMIN, CAP_SYS_CHROOT).
    """
    with _returning() as cwd:
        there = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscall(NR.unshare, _CLONE_FS)
            syscall(NR.setns, there, _CLONE_NEWNS)
        finally:
            os.close(there)
        os.fchdir(cwd)
        yield


@contextlib.contextmanager
def copied(*, follows: bool) -> Iterator[None]:
    """Have this thread, and what it forks, in a copy of its mount namespace.

    Args:
        follows: what is mounted in the original later appears in the copy; never the reverse.

    Raises:
        OSError: we may not (CAP_SYS_ADMIN).
    """
    with _returning() as cwd:
        syscall(NR.unshare, _CLONE_NEWNS)
        how = MountFlag.SLAVE if follows else MountFlag.PRIVATE
        mount("", "/", "", MountFlag.REC | how)
        os.fchdir(cwd)
        yield
