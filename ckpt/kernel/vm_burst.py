"""Small pieces of many processes' memory in one go: `process_vm.py` laid out as a `Burst`.

Source: process_vm_readv(2), process_vm_writev(2).
"""

import errno
import struct
from collections.abc import Sequence

from ckpt.errors import CkptError, TargetDamaged, TargetGone
from ckpt.kernel.arch import NR
from ckpt.kernel.burst import BurstWithRoom
from ckpt.units import Pid, RemoteAddr

_IOVEC = struct.Struct("<QQ")


class VmBurst(BurstWithRoom):
    """Reads and writes, each of one process."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self._asked: list[tuple[Pid, RemoteAddr, int]] = []

    def read(self, pid: Pid, addr: RemoteAddr, n_bytes: int) -> memoryview:
        """Return where these bytes will be when it has run."""
        memory, at, address = self.take(n_bytes)
        self._add(NR.process_vm_readv, pid, [(addr, n_bytes)], (address, n_bytes))
        return memoryview(memory)[at : at + n_bytes]

    def write(self, pid: Pid, pieces: Sequence[tuple[RemoteAddr, bytes]]) -> None:
        """Write some pieces, which are copied now."""
        source = b"".join(data for _, data in pieces)
        memory, at, address = self.take(len(source))
        memory[at : at + len(source)] = source
        remote = [(addr, len(data)) for addr, data in pieces]
        self._add(NR.process_vm_writev, pid, remote, (address, len(source)))

    def _add(
        self, nr: NR, pid: Pid, remote: Sequence[tuple[int, int]], local: tuple[int, int]
    ) -> None:
        iovecs = b"".join(_IOVEC.pack(*one) for one in (local, *remote))
        memory, at, address = self.take(len(iovecs))
        memory[at : at + len(iovecs)] = iovecs
        self.add(nr, pid, address, 1, address + _IOVEC.size, len(remote), 0)
        self._asked.append((pid, RemoteAddr(remote[0][0]), local[1]))

    def move(self) -> list[CkptError | None]:
        """Do all of it; return of each, in the order of asking, why it was not done as a whole."""
        return [
            None if moved == n_bytes else _error_of(pid, addr, moved)
            for (pid, addr, n_bytes), moved in zip(self._asked, self.run(), strict=True)
        ]


def _error_of(pid: Pid, addr: RemoteAddr, moved: int) -> CkptError:
    if moved == -errno.ESRCH:
        return TargetGone(pid)
    return TargetDamaged(pid, f"its memory at {addr:#x} could not be read or written")
