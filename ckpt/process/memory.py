"""Small, exact reads and writes of a target's memory: all of it or an error.

For structures of a few bytes to a few pages. Pages in bulk go through `kernel/process_vm.py`
directly, where a short count is a fact to be handled.
"""

from collections.abc import Sequence

from ckpt.errors import TargetDamaged, TargetGone
from ckpt.kernel import process_vm
from ckpt.units import AddrRange, Pid, RemoteAddr, Tid, addr_range


def read(pid: Pid | Tid, addr: RemoteAddr, len_bytes: int) -> bytes:
    """Return `len_bytes` bytes at `addr`, whatever the protection of the pages.

    Raises:
        TargetGone: the process ended, or nothing is mapped there any more.
    """
    return read_ranges(pid, [addr_range(addr, len_bytes)])


def read_ranges(pid: Pid | Tid, spans: Sequence[AddrRange]) -> bytes:
    """Return what is in `spans`, one after the other, whatever the protection of the pages.

    Raises:
        TargetGone: the process ended, or nothing is mapped there any more.
    """
    buffer = bytearray(sum(span.len_bytes for span in spans))
    if process_vm.readv(pid, spans, buffer) < len(buffer) and process_vm.read_mem(
        pid, spans, buffer
    ) < len(buffer):
        raise TargetGone(pid)
    return bytes(buffer)


def write(pid: Pid | Tid, addr: RemoteAddr, data: bytes) -> None:
    """Write `data` at `addr`, into memory of ours (an arena, a process being restored).

    Raises:
        TargetGone: the process ended.
        TargetDamaged: the memory is not there, which means that it is no longer ours.
    """
    write_pieces(pid, [(addr, 0, len(data))], data)


def write_pieces(
    pid: Pid | Tid, pieces: Sequence[process_vm.Piece], source: bytes | bytearray
) -> None:
    """Write pieces of `source` into memory of ours.

    Args:
        pid: whose memory.
        pieces: (address there, offset in `source`, length), in bytes.
        source: what is written.

    Raises:
        TargetGone: the process ended.
        TargetDamaged: the memory is not there, which means that it is no longer ours.
    """
    wanted = sum(len_bytes for _, _, len_bytes in pieces)
    if process_vm.writev(pid, pieces, source) < wanted:
        raise TargetDamaged(pid, f"its memory at {pieces[0][0]:#x} could not be written")
