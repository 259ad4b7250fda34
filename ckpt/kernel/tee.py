"""tee: copy what is in one pipe into another, without taking it out.

Source: tee(2).
"""

from typing import Final

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import syscall
from ckpt.units import Fd

SPLICE_F_NONBLOCK: Final = 2


def tee(source: Fd, target: Fd, len_bytes: int) -> int:
    """Duplicate up to `len_bytes` bytes from pipe to pipe; return how many, 0 if it is empty.

    Buffers are shared, not copied, one slot of the target for each of the source. A packet (pipe2
    with O_DIRECT) stays one.

    Raises:
        BlockingIOError: the source is empty (and has a writer), or the target is full.
        OSError: EINVAL, one of them is no pipe, or both are the same.
    """
    return syscall(NR.tee, source, target, len_bytes, SPLICE_F_NONBLOCK)
