"""Small, exact reads and writes of a target's memory: all of it or an error.

For structures of a few bytes to a few pages. Pages in bulk go through `kernel/process_vm.py`
directly, where a short count is a fact to be handled.
"""

from ckpt.errors import TargetDamaged, TargetGone
from ckpt.kernel import process_vm
from ckpt.units import Pid, RemoteAddr, Tid, addr_range


def read(pid: Pid | Tid, addr: RemoteAddr, len_bytes: int) -> bytes:
    """Return `len_bytes` bytes at `addr`, whatever the protection of the pages.

    Raises:
        TargetGone: the process ended, or nothing is mapped there any more.
    """
    buffer = bytearray(len_bytes)
    span = [addr_range(addr, len_bytes)]
    if (
        process_vm.readv(pid, span, buffer) < len_bytes
        and process_vm.read_mem(pid, span, buffer) < len_bytes
    ):
        raise TargetGone(pid)
    return bytes(buffer)


def write(pid: Pid | Tid, addr: RemoteAddr, data: bytes) -> None:
    """Write `data` at `addr`, into memory of ours (an arena, a process being restored).

    Raises:
        TargetGone: the process ended.
        TargetDamaged: the memory is not there, which means that it is no longer ours.
    """
    if process_vm.writev(pid, [(addr, 0, len(data))], data) < len(data):
        raise TargetDamaged(pid, f"its memory at {addr:#x} could not be written")
