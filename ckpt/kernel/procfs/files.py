"""Opening what is below /proc/PID: whole files, links and lists of numbers.

The other modules of this package read through here. Text is decoded as UTF-8 with
surrogateescape, so that a file name of any bytes survives the way back through `os.fsencode`.
"""

import os

from ckpt.kernel.failures import proc_failures_of
from ckpt.units import Pid, RemoteFd, Tid

_CHUNK_BYTES = 1 << 16


def read_bytes(pid: Pid | Tid, name: str) -> bytes:
    """Return all of /proc/PID/`name`.

    Raises:
        TargetGone: the process ended (or this kernel has no such file).
        NotPermitted: the file may not be opened.
    """
    with proc_failures_of(pid, f"read /proc/{pid}/{name}"):
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while part := os.read(fd, _CHUNK_BYTES):
                parts.append(part)
        finally:
            os.close(fd)
    return b"".join(parts)


def read_text(pid: Pid | Tid, name: str) -> str:
    """Return all of /proc/PID/`name` as text (UTF-8, surrogateescape).

    Raises:
        TargetGone: the process ended (or this kernel has no such file).
        NotPermitted: the file may not be opened.
    """
    return decode(read_bytes(pid, name))


def decode(raw: bytes) -> str:
    """Return what was read as text (UTF-8, surrogateescape)."""
    return raw.decode(errors="surrogateescape")


def read_link(pid: Pid | Tid, name: str) -> str:
    """Return where /proc/PID/`name` points, as it is (" (deleted)" included).

    Raises:
        TargetGone: the process ended (or has nothing there: no exe, no such descriptor).
        NotPermitted: ptrace access is refused.
    """
    with proc_failures_of(pid, f"read /proc/{pid}/{name}"):
        return os.readlink(f"/proc/{pid}/{name}")


def list_tids(pid: Pid) -> list[Tid]:
    """Return the threads of the process, ascending; zombie threads included.

    Asked for by the number of another thread than the first one, that is left out if it has ended:
    all that it had for itself is gone, and only its number is kept for the process.

    The list is a moment's: threads come and go while it is read, unless all are stopped.

    Raises:
        TargetGone: the process ended and was waited for.
    """
    with (
        proc_failures_of(pid, f"list /proc/{pid}/task"),
        os.scandir(f"/proc/{pid}/task") as entries,
    ):
        # The kernel begins with the first one, whatever its number.
        first, *others = [int(entry.name) for entry in entries] or [int(pid)]
    if first != pid and others and _has_ended(pid, first):
        return [Tid(number) for number in sorted(others)]
    return [Tid(number) for number in sorted([first, *others])]


def _has_ended(pid: Pid, tid: int) -> bool:
    words = read_bytes(pid, f"task/{tid}/stat").rpartition(b")")[2].split()
    return words[:1] in ([b"Z"], [b"X"])


def list_fds(pid: Pid | Tid) -> list[RemoteFd]:
    """Return the open descriptors, ascending.

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access is refused.
    """
    return [RemoteFd(number) for number in _numbers(pid, "fd")]


def list_pids() -> list[Pid]:
    """Return all processes that this /proc shows, ascending; a moment's view."""
    with os.scandir("/proc") as entries:
        return sorted(Pid(int(entry.name)) for entry in entries if entry.name.isdigit())


def _numbers(pid: Pid | Tid, name: str) -> list[int]:
    with (
        proc_failures_of(pid, f"list /proc/{pid}/{name}"),
        os.scandir(f"/proc/{pid}/{name}") as entries,
    ):
        return sorted(int(entry.name) for entry in entries)
