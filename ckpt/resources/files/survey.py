"""What /proc tells of all descriptors of a process: while it runs, and again once it is frozen.

A frozen target waits for every system call of this, so the second reading is one burst
(`kernel/burst.py`) over files that were opened for the first one:

    /proc/PID/fdinfo/N      opened, read again by pread: the kernel writes it anew each time, for
                            whatever is number N by then
    /proc/PID/fd/N          the link itself, opened (O_PATH); where it leads is asked anew
    stat of /proc/PID/fd/N  by name: it is the file behind it that is asked; or, three times as
                            quick, of the path that the link shows, if that led to the file before,
                            and the link, the mount and the inode number are still the same

Nothing here holds on to a file of the target: what it closes is closed. About 5 us for each
descriptor, of which the interpreter sees only those that are not as they were.

Kernel: proc_pid_fd(5), proc_pid_fdinfo(5), stat(2).
"""

import contextlib
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator

import attrs

from ckpt.errors import TargetGone
from ckpt.kernel.arch import NR
from ckpt.kernel.burst import Burst
from ckpt.kernel.failures import proc_failures_of
from ckpt.kernel.libc import readable_address, writable_address
from ckpt.kernel.procfs.files import read_bytes
from ckpt.kernel.procfs.held import Descriptors
from ckpt.units import Pid, RemoteFd

_INFO_BYTES, _LINK_BYTES, _STATUS_BYTES = 512, 256, 144
_SLOT_BYTES = _INFO_BYTES + _LINK_BYTES + _STATUS_BYTES
_STATUS = struct.Struct("<QQQIIIxxxxQqqq6Q")
"""`struct stat` of x86-64 (arch/x86/include/uapi/asm/stat.h), up to the times."""
_NS_PER_S = 1_000_000_000
_EMPTY = bytearray(b"\0")


@attrs.frozen(slots=True, eq=False, repr=False)
class Raw:
    """What was read of one descriptor."""

    info: bytes
    """The text of its fdinfo."""
    link: str
    status: os.stat_result
    """Of the file behind it."""


class Survey:
    """All descriptors of one process; read as often as one likes."""

    def __init__(self, pid: Pid) -> None:
        """Open what is needed; `read` comes next."""
        self._pid = pid
        self._descriptors = Descriptors()
        self._held = self._descriptors.fds
        self.close = self._descriptors.close
        try:
            self._links, self._infos = self._open_folder("fd"), self._open_folder("fdinfo")
        except BaseException:
            self.close()
            raise
        self._names: dict[RemoteFd, bytearray] = {}
        """What the burst asks for."""
        self._calls = Burst()
        self._now = bytearray()
        self._before: tuple[bytes, list[int]] = b"", []
        self._by_path: dict[RemoteFd, tuple[Raw, bytearray]] = {}
        """What was read of the descriptor when its path led to its file, and that path."""
        self._burst: dict[RemoteFd, Raw] = {}
        """What the last burst has read."""

    def _open_folder(self, name: str) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        with proc_failures_of(self._pid, f"list /proc/{self._pid}/{name}"):
            folder = os.open(f"/proc/{self._pid}/{name}", flags)
        self._held.append(folder)
        return folder

    def _list(self) -> list[RemoteFd]:
        with proc_failures_of(self._pid, f"list /proc/{self._pid}/fd"):
            return sorted(RemoteFd(int(name)) for name in os.listdir(self._links))

    def prepare(self) -> None:
        """Open the files of all descriptors that there are, as far as we may open so many."""
        fds = self._list()
        if not self._descriptors.make_room(2 * len(fds)):
            return
        for fd in fds:
            with contextlib.suppress(OSError):
                self._prepare(fd)
        self._now = bytearray(_SLOT_BYTES * len(self._names))
        address, _ = writable_address(self._now) if self._now else (0, 0)
        empty, _ = readable_address(_EMPTY)
        held = iter(self._held[2:])
        for name in self._names.values():
            info, link = next(held), next(held)
            self._calls.add(NR.pread64, info, address, _INFO_BYTES, 0)
            address += _INFO_BYTES
            self._calls.add(NR.readlinkat, link, empty, address, _LINK_BYTES)
            address += _LINK_BYTES
            named, _ = readable_address(name)
            self._calls.add(NR.newfstatat, self._links, named, address, 0)
            address += _STATUS_BYTES

    def ask_by_path(self, fds: Iterable[RemoteFd]) -> None:
        """Ask for the files of these descriptors by their paths from now on, where that is sure."""
        index = {fd: number for number, fd in enumerate(self._names)}
        address, _ = writable_address(self._now) if self._now else (0, 0)
        for fd in fds:
            raw = self._burst.get(fd)
            if raw is None or not _is_found_by_path(raw):
                continue
            path = bytearray(os.fsencode(raw.link) + b"\0")
            self._by_path[fd] = raw, path
            at = address + index[fd] * _SLOT_BYTES + _INFO_BYTES + _LINK_BYTES
            self._calls.replace(3 * index[fd] + 2, NR.stat, readable_address(path)[0], at)

    def _is_the_file(self, fd: RemoteFd, raw: Raw) -> bool:
        """Tell whether the status that was read by a path is that of the descriptor's file."""
        if fd not in self._by_path:
            return True
        before, _ = self._by_path[fd]
        return (
            raw.link == before.link
            and os.path.samestat(raw.status, before.status)
            and _place_of(raw) == _place_of(before)
        )

    def _prepare(self, fd: RemoteFd) -> None:
        name = str(fd)
        link_flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        info = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._infos)
        try:
            link = os.open(name, link_flags, dir_fd=self._links)
        except OSError:
            os.close(info)
            raise
        self._held += info, link
        self._names[fd] = bytearray(name.encode() + b"\0")

    def read(self) -> dict[RemoteFd, Raw]:
        """Return every descriptor, ascending; the same object for one that has not changed.

        State: any; of a running process each is read at another moment, and one that is being
            closed or opened may be left out.

        Raises:
            TargetGone: the process ended.
        """
        results = list(self._calls.run())
        now = bytes(self._now)
        burst = self._burst
        if (now, results) != self._before:
            burst = dict(self._iter_read(now, results))
        self._before, self._burst = (now, results), burst
        # The size of the folder is the number of descriptors (Linux 6.2).
        with proc_failures_of(self._pid, f"count /proc/{self._pid}/fd"):
            n_listed = os.fstat(self._links).st_size
        if n_listed == len(burst) > 0:
            return burst
        return dict(self._iter_listed(burst))

    def _iter_read(self, now: bytes, results: list[int]) -> Iterator[tuple[RemoteFd, Raw]]:
        """Yield what the burst has read, but for what did not fit into its place."""
        before, results_before = self._before
        for index, fd in enumerate(self._names):
            at, nth = index * _SLOT_BYTES, 3 * index
            slot, result = now[at : at + _SLOT_BYTES], results[nth : nth + 3]
            known = self._burst.get(fd)
            if (
                known is not None
                and slot == before[at : at + _SLOT_BYTES]
                and result == results_before[nth : nth + 3]
            ):
                yield fd, known
            elif 0 < result[0] < _INFO_BYTES and 0 < result[1] < _LINK_BYTES and result[2] == 0:
                raw = _parse(slot, result[0], result[1])
                if self._is_the_file(fd, raw):
                    yield fd, raw

    def _iter_listed(self, burst: dict[RemoteFd, Raw]) -> Iterator[tuple[RemoteFd, Raw]]:
        """Yield all that are listed; those that the burst has not read are read one by one."""
        for fd in self._list():
            found = burst.get(fd) or self._read_one(fd)
            if found is not None:
                yield fd, found

    def _read_one(self, fd: RemoteFd) -> Raw | None:
        name = str(fd)
        try:
            info = read_bytes(self._pid, f"fdinfo/{name}")
            link = os.readlink(name, dir_fd=self._links)
            return Raw(info, link, os.stat(name, dir_fd=self._links))
        except (FileNotFoundError, TargetGone):
            return None


_PLACE = re.compile(rb"\nmnt_id:\t(\d+)\nino:\t(\d+)\n")


def _place_of(raw: Raw) -> tuple[bytes, ...]:
    """Return mount and inode number; nothing before Linux 5.14, which does not tell the latter."""
    found = _PLACE.search(raw.info)
    return found.groups() if found else ()


def _is_found_by_path(raw: Raw) -> bool:
    """Tell whether the path of a regular file or a directory leads to it, beyond any doubt."""
    mode = raw.status.st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or not _place_of(raw):
        return False
    if not raw.link.startswith("/") or raw.link.endswith(" (deleted)"):
        return False
    try:
        return os.path.samestat(os.stat(raw.link), raw.status)
    except OSError:
        return False


def _parse(slot: bytes, info_bytes: int, link_bytes: int) -> Raw:
    return Raw(
        slot[:info_bytes],
        os.fsdecode(slot[_INFO_BYTES : _INFO_BYTES + link_bytes]),
        parse_status(slot[_INFO_BYTES + _LINK_BYTES :]),
    )


def parse_status(raw: bytes) -> os.stat_result:
    """Return what os.stat would from the kernel's own `struct stat`."""
    words: tuple[int, ...] = _STATUS.unpack_from(raw)
    dev, ino, n_links, mode, uid, gid, rdev, size, block_bytes, n_blocks = words[:10]
    accessed_s, accessed_ns, modified_s, modified_ns, changed_s, changed_ns = words[10:]
    times = (accessed_s, modified_s, changed_s)
    return os.stat_result(
        (mode, ino, dev, n_links, uid, gid, size, *times),
        {
            "st_atime": accessed_s + accessed_ns / _NS_PER_S,
            "st_mtime": modified_s + modified_ns / _NS_PER_S,
            "st_ctime": changed_s + changed_ns / _NS_PER_S,
            "st_atime_ns": accessed_s * _NS_PER_S + accessed_ns,
            "st_mtime_ns": modified_s * _NS_PER_S + modified_ns,
            "st_ctime_ns": changed_s * _NS_PER_S + changed_ns,
            "st_blksize": block_bytes,
            "st_blocks": n_blocks,
            "st_rdev": rdev,
        },
    )
