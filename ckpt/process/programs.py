"""Programs of a few instructions, as ELF files in memory: the seed and the keeper.

    0x000  ELF header, one program header
    0x078  code

One read-and-execute segment at `LOAD_AT`; no stack of its own to care for, no library. Started
with posix_spawn from a memfd, so no file of ours is needed on the target's disk.
"""

import fcntl
import os
import struct

from ckpt.kernel.arch import x86_64 as arch
from ckpt.units import Fd, Pid, RemoteAddr

LOAD_AT = RemoteAddr(0x10000)
"""Where the segment lies: at the lowest page that any process may map (vm.mmap_min_addr)."""
_HEADERS = 0x78
CODE_AT = RemoteAddr(LOAD_AT + _HEADERS)
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_EM_X86_64, _ET_EXEC, _PT_LOAD, _PF_RX = 62, 2, 1, 5


def elf(code: bytes) -> bytes:
    """Return a static ELF executable that runs `code`."""
    size = _HEADERS + len(code)
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header = _ELF_HEADER.pack(ident, _ET_EXEC, _EM_X86_64, 1, CODE_AT, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = _PROGRAM_HEADER.pack(
        _PT_LOAD, _PF_RX, 0, LOAD_AT, LOAD_AT, size, size, arch.PAGE_SIZE
    )
    return header + segment + code


def _in_memory(name: str, content: bytes, lowest: int) -> int:
    """Return a descriptor of a file in memory, numbered `lowest` or above."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)
    finally:
        os.close(fd)


def spawn(name: str, code: bytes, fds: dict[Fd, Fd], *, survives: bool) -> Pid:
    """Start a program of ours; `fds` says which of our descriptors it has, under which numbers.

    Args:
        name: its name in ps, 15 characters at most.
        code: position-independent machine code, see `arch`.
        fds: number there -> descriptor here; of the three standard ones only those named here.
        survives: whether it lives on without us, in a session of its own (nothing of a terminal
            reaches it). If not, it dies with the calling thread, even one that is killed.
    """
    # The kernel would call it by the number of the descriptor that it was started from.
    code = arch.named(name) + code
    if not survives:
        code = arch.bound(Pid(os.getpid())) + code
    # The numbers must not be overwritten before they are used: move what is in the way.
    above = max([*fds, 2]) + 1
    moved = [_in_memory(name, elf(code), above)]
    path = f"/proc/self/fd/{moved[0]}"
    try:
        # A pipe of whoever called us must not be held open by a program of ours.
        actions: list[tuple[int, int] | tuple[int, int, int]] = [
            (os.POSIX_SPAWN_CLOSE, fd) for fd in (0, 1, 2) if fd not in fds
        ]
        for there, here in fds.items():
            moved.append(fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, above))
            actions.append((os.POSIX_SPAWN_DUP2, moved[-1], there))
        return Pid(
            os.posix_spawn(path, [name], {}, file_actions=actions, setsid=survives, setsigmask=[])
        )
    finally:
        for fd in moved:
            os.close(fd)
