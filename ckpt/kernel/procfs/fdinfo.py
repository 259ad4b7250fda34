"""/proc/PID/fdinfo/FD: the open file description behind a descriptor, kind by kind.

Every kind of file adds lines of its own to the common ones. The parser knows those of the kinds
that are captured; whatever it does not know it keeps in `other`, so that a resource can tell "no
such line" from "never heard of".

Source: proc_pid_fdinfo(5), Documentation/filesystems/proc.rst, `show_fdinfo` of each kind.
"""

import os

import attrs

from ckpt.errors import TargetGone
from ckpt.kernel.procfs.files import read_text
from ckpt.units import Pid, RemoteFd, Tid

_MINOR_BITS = 20


@attrs.frozen(slots=True, repr=False)
class EpollTarget:
    """One `tfd:` line: a file that an epoll instance watches."""

    tfd: int
    """The number that it was added under, which may be closed, or another file's, since."""
    events: int
    data: int
    """The 64-bit word that epoll_wait hands back."""
    pos: int
    inode: int
    dev: tuple[int, int]
    """Major and minor number of the file system."""


@attrs.frozen(slots=True, repr=False)
class EventFd:
    """The lines of an eventfd."""

    count: int
    eventfd_id: int | None
    """Unique as long as the machine runs (5.2)."""
    semaphore: bool | None
    """None where the kernel does not tell (before 6.5)."""


@attrs.frozen(slots=True, repr=False)
class TimerFd:
    """The lines of a timerfd."""

    clock_id: int
    ticks: int
    """Expirations that have not been read yet."""
    settime_flags: int
    """Bit 0: the time was given as absolute; bit 1: cancelled when the clock is set."""
    left_ns: int
    """Until it expires; 0 if disarmed."""
    interval_ns: int


@attrs.frozen(slots=True, repr=False)
class InotifyWatch:
    """One `inotify` line."""

    wd: int
    inode: int
    dev: tuple[int, int]
    mask: int
    handle_type: int | None
    """With `handle`, what open_by_handle_at(2) takes; None where the file system has none."""
    handle: bytes | None


@attrs.frozen(slots=True, repr=False)
class PidFd:
    """The lines of a pidfd."""

    pid: int
    """-1 if the process was waited for; 0 if the reader cannot see it."""
    ns_pids: tuple[int, ...]
    """In its pid namespaces, from the reader's to its own; empty if the reader cannot see it."""


@attrs.frozen(slots=True, repr=False)
class FileLock:
    """One `lock:` line: a lock or lease that is held through this open file description."""

    kind: str
    """`FLOCK`, `POSIX`, `OFDLCK`, `LEASE`, `DELEG`."""
    state: str
    """`ADVISORY`, `ACTIVE`, `BREAKING`, ..."""
    mode: str
    """`READ`, `WRITE` or `UNLCK`."""
    pid: int
    """The holder; -1 for OFDLCK."""
    dev: tuple[int, int]
    inode: int
    start: int
    end: int | None
    """The last byte; None up to the end of the file, however it grows."""


@attrs.frozen(slots=True, repr=False)
class FdInfo:
    """All that fdinfo tells of one descriptor."""

    pos: int
    flags: int
    """Of open(2), with O_CLOEXEC if the *descriptor* has it."""
    mnt_id: int
    inode: int | None
    """None before 5.14."""
    eventfd: EventFd | None = None
    epoll_targets: tuple[EpollTarget, ...] = ()
    signalfd_mask: int | None = None
    """Bit n - 1 is signal n."""
    timerfd: TimerFd | None = None
    inotify_watches: tuple[InotifyWatch, ...] = ()
    pidfd: PidFd | None = None
    locks: tuple[FileLock, ...] = ()
    other: tuple[tuple[str, str], ...] = ()
    """(key, value) of every other line, in order; the whole line and "" where it has no colon."""

    @property
    def close_on_exec(self) -> bool:
        """Tell whether the descriptor (not the description) is closed by exec."""
        return bool(self.flags & os.O_CLOEXEC)

    def other_value(self, key: str) -> str | None:
        """Return the value of the first line `key` of `other`, None if there is none."""
        return next((value for name, value in self.other if name == key), None)


class _Collected:
    """The lines of one file, sorted by what they belong to."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.epoll_targets: list[EpollTarget] = []
        self.inotify_watches: list[InotifyWatch] = []
        self.locks: list[FileLock] = []
        self.other: list[tuple[str, str]] = []

    def add(self, line: str) -> None:
        key, colon, value = line.partition(":")
        if key == "tfd":
            self.epoll_targets.append(_parse_epoll_target(line))
        elif line.startswith("inotify "):
            self.inotify_watches.append(_parse_inotify(line))
        elif key == "lock":
            self.locks.append(_parse_lock(value))
        elif key in _KNOWN_FIELDS:
            self.fields[key] = value.strip()
        else:
            self.other.append((key, value.strip()) if colon else (line, ""))


_KNOWN_FIELDS = frozenset(
    {
        "pos",
        "flags",
        "mnt_id",
        "ino",
        "eventfd-count",
        "eventfd-id",
        "eventfd-semaphore",
        "sigmask",
        "clockid",
        "ticks",
        "settime flags",
        "it_value",
        "it_interval",
        "Pid",
        "NSpid",
    }
)


def parse_fdinfo(text: str) -> FdInfo:
    """Parse /proc/PID/fdinfo/FD.

    Raises:
        ValueError: `pos`, `flags` or `mnt_id` is missing, or a known line is malformed.
    """
    lines = _Collected()
    for line in text.split("\n"):
        if line:
            lines.add(line)
    fields = lines.fields
    try:
        return FdInfo(
            pos=int(fields["pos"]),
            flags=int(fields["flags"], 8),
            mnt_id=int(fields["mnt_id"]),
            inode=int(fields["ino"]) if "ino" in fields else None,
            eventfd=_eventfd_of(fields),
            epoll_targets=tuple(lines.epoll_targets),
            signalfd_mask=int(fields["sigmask"], 16) if "sigmask" in fields else None,
            timerfd=_timerfd_of(fields),
            inotify_watches=tuple(lines.inotify_watches),
            pidfd=_pidfd_of(fields),
            locks=tuple(lines.locks),
            other=tuple(lines.other),
        )
    except KeyError as error:
        raise ValueError(f"fdinfo has no line {error}") from error


def _eventfd_of(fields: dict[str, str]) -> EventFd | None:
    if "eventfd-count" not in fields:
        return None
    return EventFd(
        count=int(fields["eventfd-count"], 16),
        eventfd_id=int(fields["eventfd-id"]) if "eventfd-id" in fields else None,
        semaphore=fields["eventfd-semaphore"] == "1" if "eventfd-semaphore" in fields else None,
    )


def _timerfd_of(fields: dict[str, str]) -> TimerFd | None:
    if "clockid" not in fields:
        return None
    return TimerFd(
        clock_id=int(fields["clockid"]),
        ticks=int(fields["ticks"]),
        settime_flags=int(fields["settime flags"], 8),
        left_ns=_timespec_ns(fields["it_value"]),
        interval_ns=_timespec_ns(fields["it_interval"]),
    )


def _pidfd_of(fields: dict[str, str]) -> PidFd | None:
    if "Pid" not in fields:
        return None
    ns_pids = tuple(int(word) for word in fields.get("NSpid", "").split() if int(word) > 0)
    return PidFd(int(fields["Pid"]), ns_pids)


def _timespec_ns(text: str) -> int:
    seconds, nanoseconds = text.strip("()").split(",")
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def _dev(text: str) -> tuple[int, int]:
    """Split the kernel's own dev_t, which has 20 bits of minor number (not stat's encoding)."""
    number = int(text, 16)
    return number >> _MINOR_BITS, number & (1 << _MINOR_BITS) - 1


def _parse_epoll_target(line: str) -> EpollTarget:
    # The kernel aligns with spaces after some colons: join them, then each word is key:value.
    words = line.replace(":", ": ").split()
    fields = dict(zip(words[::2], words[1::2], strict=True))
    return EpollTarget(
        tfd=int(fields["tfd:"]),
        events=int(fields["events:"], 16),
        data=int(fields["data:"], 16),
        pos=int(fields.get("pos:", "0")),
        inode=int(fields.get("ino:", "0"), 16),
        dev=_dev(fields.get("sdev:", "0")),
    )


def _parse_inotify(line: str) -> InotifyWatch:
    fields = dict(word.split(":", 1) for word in line.split()[1:])
    handle = fields.get("f_handle")
    return InotifyWatch(
        wd=int(fields["wd"], 16),
        inode=int(fields["ino"], 16),
        dev=_dev(fields["sdev"]),
        mask=int(fields["mask"], 16),
        handle_type=int(fields["fhandle-type"], 16) if handle is not None else None,
        handle=bytes.fromhex(handle) if handle is not None else None,
    )


def _parse_lock(text: str) -> FileLock:
    words = text.split()
    if len(words) != 8:
        raise ValueError(f"not a lock of fdinfo: {text!r}")
    _, kind, state, mode, pid, where, start, end = words
    major, minor, inode = where.split(":")
    return FileLock(
        kind=kind,
        state=state,
        mode=mode,
        pid=int(pid),
        dev=(int(major, 16), int(minor, 16)),
        inode=int(inode),
        start=int(start),
        end=None if end == "EOF" else int(end),
    )


def read_fdinfo(pid: Pid | Tid, fd: RemoteFd) -> FdInfo | None:
    """Read /proc/PID/fdinfo/FD; None if the descriptor is not open (any more).

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access is refused.
    """
    try:
        return parse_fdinfo(read_text(pid, f"fdinfo/{fd}"))
    except TargetGone:
        if os.path.exists(f"/proc/{pid}/fdinfo"):
            return None
        raise
