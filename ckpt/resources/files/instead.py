"""What the user of a restore has put in the place of something that led outside the tree.

    --inherit 1=/var/log/job          by the number it had: a file, opened as it was
    --inherit 'pipe:[4711]=5'         by its name: descriptor 5 of the restoring command, as it is
    --inherit 'pipe:[4711]=6'         and the other end of the same pipe

A name may be given several times: what leads both ways through one pipe has two ends, and each
description gets the first that can be read, or written, as it was.

Kernel: fcntl(2) F_GETFL, open(2) of /proc/self/fd/N.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Mapping

from ckpt.resources.base import Instead
from ckpt.resources.files.kind import duplicate, set_status_flags
from ckpt.resources.files.open_file import Problem, may_read, may_write
from ckpt.units import Fd


def choose(external: Mapping[str, tuple[Instead, ...]], key: str, flags: int) -> Instead | None:
    """Return what stands for `key` with the access of `flags`; None if nothing was named.

    If none of several can be used as it was, the first is returned, which `find_problem` refuses.
    """
    named = external.get(key, ())
    fitting = (one for one in named if find_problem(one, key, flags) is None)
    return next(fitting, named[0] if named else None)


def find_problem(chosen: Instead, key: str, flags: int) -> Problem | None:
    """Tell why something cannot stand for what was opened with `flags`."""
    if isinstance(chosen, str):
        folder = os.path.dirname(chosen) or "."
        if os.path.exists(chosen) or (may_write(flags) and os.path.isdir(folder)):
            return None
        return Problem(f"{chosen}, which shall stand for it, is not there", _remedy(key))
    try:
        ours = fcntl.fcntl(chosen, fcntl.F_GETFL)
    except OSError:
        text = f"descriptor {chosen} of this command, which shall stand for it, is not open"
        return Problem(text, _remedy(key))
    for can, access in ((may_read, "read"), (may_write, "written")):
        if can(flags) and not can(ours):
            text = f"descriptor {chosen} of this command, which shall stand for it, cannot be"
            return Problem(f"{text} {access}", "give the other end, or both: --inherit twice")
    return None


def _remedy(key: str) -> str:
    return f"--inherit '{key}=FD', a descriptor of this command, or '{key}=PATH'"


def missing(key: str) -> Problem:
    """Tell that nothing was named."""
    return Problem("led outside the tree, and nothing stands for it", _remedy(key))


def take(chosen: Instead, fd: int, flags: int) -> Fd:
    """Return a descriptor on what stands for descriptor `fd` of the process.

    Raises:
        OSError: it cannot be opened.
    """
    if isinstance(chosen, str):
        return open_path(chosen, fd, flags)
    return lend(chosen, flags)


def open_path(path: str, fd: int, flags: int) -> Fd:
    """Open `path` as the user wants it in place of descriptor `fd`, as a shell would redirect.

    What is written goes to the end of a file that exists; what is read is read from its start.
    """
    writable = may_write(flags)
    wanted = flags & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK) | os.O_NOCTTY | os.O_CLOEXEC
    opened = Fd(os.open(path, wanted | (os.O_CREAT if writable else 0), 0o666))
    if writable and fd != 0:
        with contextlib.suppress(OSError):
            os.lseek(opened, 0, os.SEEK_END)
    return opened


def lend(fd: int, flags: int) -> Fd:
    """Return a descriptor on what is our own `fd`, blocking or not as the process had it."""
    ours = fcntl.fcntl(fd, fcntl.F_GETFL)
    if (ours ^ flags) & os.O_NONBLOCK:
        try:
            return _reopen(fd, ours, flags)
        except OSError:
            # A socket, or not ours to open: then whoever shares it has to bear the change.
            lent = duplicate(fd)
            set_status_flags(lent, ours & ~os.O_NONBLOCK | flags & os.O_NONBLOCK)
            return lent
    return duplicate(fd)


def _reopen(fd: int, ours: int, flags: int) -> Fd:
    """Open the terminal or pipe once more, so that O_NONBLOCK is not set for our caller too."""
    mode = os.stat(fd).st_mode
    if not stat.S_ISCHR(mode) and not stat.S_ISFIFO(mode):
        raise OSError("a file would have another offset")
    keep = ours & (os.O_ACCMODE | os.O_APPEND) | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    reopened = Fd(os.open(f"/proc/self/fd/{fd}", keep))
    set_status_flags(reopened, ours & ~os.O_NONBLOCK | flags & os.O_NONBLOCK)
    return reopened
