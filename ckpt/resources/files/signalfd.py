"""Signals to be read: a signalfd and its mask.

Kernel: signalfd(2); the mask is the `sigmask` line of fdinfo (Linux 3.8), in which SIGKILL and
SIGSTOP never are. There is no more to it: what is read are the pending signals of whoever reads,
which `signals` and `threads` bring back.
"""

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address, syscall
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, set_status_flags
from ckpt.resources.files.open_file import OpenFile
from ckpt.units import Fd

_NEW = 2**64 - 1
"""-1 for signalfd4: make a new one."""
_MASK_BYTES = 8
_CLOSE_ON_EXEC = 0o2000000


@attrs.frozen(slots=True, repr=False)
class SignalfdRecord:
    """A mask."""

    mask: int
    """Bit n - 1 is signal n."""

    def __attrs_post_init__(self) -> None:
        """Refuse what is no set of signals."""
        if not 0 <= self.mask < 2 ** (8 * _MASK_BYTES):
            raise ValueError(f"there are no signals {self.mask:#x}")


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return file.info.signalfd_mask is not None


def capture(file: OpenFile, _table: FdTable, _replies: list[Reply]) -> SignalfdRecord:
    """See `Kind.capture`."""
    assert file.info.signalfd_mask is not None
    return SignalfdRecord(file.info.signalfd_mask)


def open_again(record: SignalfdRecord, flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    mask = record.mask.to_bytes(_MASK_BYTES, "little")
    address, _ = readable_address(mask)
    fd = Fd(syscall(NR.signalfd4, _NEW, address, _MASK_BYTES, _CLOSE_ON_EXEC))
    set_status_flags(fd, flags)
    return fd


SIGNALFD = Kind(
    "signalfd",
    SignalfdRecord,
    matches=matches,
    reads_nothing=True,
    capture=capture,
    open=open_again,
)
