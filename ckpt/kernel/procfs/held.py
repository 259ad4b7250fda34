"""Files of /proc that are opened beforehand, to be read all at once when it matters.

The kernel writes such a file anew for each reading from its start. What is held are files of /proc,
nothing of the process: it can end, and its threads too, and the reading then says so.
"""

import os

from ckpt.errors import CkptError
from ckpt.kernel.arch import NR
from ckpt.kernel.burst import Burst
from ckpt.kernel.failures import proc_failures_of
from ckpt.kernel.libc import writable_address
from ckpt.units import Pid

_ROOM_BYTES = 4096
_OTHER_FILES = 256
"""How many descriptors we need besides."""
_FEW = 64
"""Of so many it is enough that those which cannot be opened are left out."""


class Descriptors:
    """Descriptors of ours, many of them; to be closed with `close`.

    Never when nobody has this any more: Python drops what is raised in a finalizer, the interrupt
    of a user too; and in a fork of ours the numbers may be others' by then.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.fds: list[int] = []
        self._limit: list[tuple[int, int]] = []

    def make_room(self, n_files: int) -> bool:
        """Raise our own soft limit of open files until `close`; False if the hard one forbids."""
        if n_files <= _FEW:
            return True
        # Imported where needed: most processes have few threads and files.
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = n_files + len(os.listdir("/proc/self/fd")) + _OTHER_FILES
        if resource.RLIM_INFINITY in (soft, hard) or need <= soft:
            return True
        if need > hard:
            return False
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
        self._limit.append((need, soft))
        return True

    def close(self) -> None:
        """Close them, and take the room back."""
        while self.fds:
            os.close(self.fds.pop())
        if not self._limit:
            return
        import resource

        for raised, before in self._limit:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft == raised:
                resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
        self._limit.clear()


class HeldFiles:
    """Some files below /proc/PID, each of which the kernel writes in one piece."""

    def __init__(self, pid: Pid, names: list[str]) -> None:
        """Open them; those that cannot be opened are left out, and all if they are too many."""
        self._descriptors = Descriptors()
        self.close = self._descriptors.close
        self._names: list[str] = []
        self._calls = Burst()
        if not self._descriptors.make_room(len(names)):
            names = []
        self._buffer = bytearray(_ROOM_BYTES * len(names))
        address, _ = writable_address(self._buffer) if names else (0, 0)
        for name in names:
            try:
                with proc_failures_of(pid, f"read /proc/{pid}/{name}"):
                    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            except (CkptError, OSError):
                continue
            self._descriptors.fds.append(fd)
            at = address + _ROOM_BYTES * len(self._names)
            self._calls.add(NR.pread64, fd, at, _ROOM_BYTES, 0)
            self._names.append(name)

    def read_sizes(self) -> dict[str, int]:
        """Return how much is in them now, by name: bytes, up to a page; without those gone."""
        results = self._calls.run()
        return {name: n for name, n in zip(self._names, results, strict=True) if n >= 0}

    def read(self) -> dict[str, bytes]:
        """Return what is in them now, by name; without those that are gone, or very long.

        Not for those that show the address space which the process had when they were opened: maps,
        auxv, environ and their like.
        """
        results = self._calls.run()
        return {
            name: bytes(self._buffer[index * _ROOM_BYTES : index * _ROOM_BYTES + size])
            for index, (name, size) in enumerate(zip(self._names, results, strict=True))
            if 0 <= size < _ROOM_BYTES
        }
