"""Many PAGEMAP_SCANs of one address space in one go: `pagemap.scan` laid out as a `Burst`.

Each has room for a few runs of pages. One that finds more goes on alone: it takes longer than the
interpreter anyway.
"""

import errno
import os
import struct

from ckpt.errors import TargetGone
from ckpt.kernel import pagemap
from ckpt.kernel.arch import NR
from ckpt.kernel.burst import BurstWithRoom
from ckpt.kernel.pagemap import PAGEMAP_SCAN, Region
from ckpt.units import AddrRange, RemoteAddr

_ARG = struct.Struct("<12Q")
"""`struct pm_scan_arg`."""
_WALK_END = 32
"""Offset in it."""
_REGION = struct.Struct("<QQQ")
_N_REGIONS = 32
_VEC_BYTES = _N_REGIONS * _REGION.size


class ScanBurst(BurstWithRoom):
    """Scans of one pagemap, each with its own conditions."""

    def __init__(self, fd: int) -> None:
        """Begin with none; `fd` is of /proc/PID/pagemap."""
        super().__init__()
        self._fd = fd
        self._asked: list[tuple[AddrRange, dict[str, int], bytearray, int]] = []

    def scan(
        self,
        span: AddrRange,
        *,
        category_mask: int = 0,
        category_inverted: int = 0,
        category_anyof_mask: int = 0,
        return_mask: int,
        flags: int = 0,
    ) -> None:
        """See `pagemap.scan`."""
        memory, at, address = self.take(_ARG.size + _VEC_BYTES)
        place = (address + _ARG.size, _N_REGIONS, 0)
        masks = (category_inverted, category_mask, category_anyof_mask, return_mask)
        _ARG.pack_into(memory, at, _ARG.size, flags, span.start, span.end, 0, *place, *masks)
        self.add(NR.ioctl, self._fd, PAGEMAP_SCAN, address)
        asked = {
            "category_mask": category_mask,
            "category_inverted": category_inverted,
            "category_anyof_mask": category_anyof_mask,
            "return_mask": return_mask,
            "flags": flags,
        }
        self._asked.append((span, asked, memory, at))

    def collect(self) -> list[list[Region]]:
        """Make all scans; return what each has found, in the order of asking.

        Raises:
            TargetGone: the address space has ended, by exec or with the process.
            OSError: see `pagemap.scan`.
        """
        found = []
        for (span, asked, memory, at), n_found in zip(self._asked, self.run(), strict=True):
            if n_found < 0:
                if n_found == -errno.ESRCH:
                    raise TargetGone(pagemap.pid_behind(self._fd))
                raise OSError(-n_found, os.strerror(-n_found))
            first = at + _ARG.size
            told = memoryview(memory)[first : first + n_found * _REGION.size]
            regions: list[Region] = list(_REGION.iter_unpack(told))
            (walk_end,) = struct.unpack_from("<Q", memory, at + _WALK_END)
            if walk_end < span.end:
                rest = AddrRange(RemoteAddr(walk_end), span.end)
                more = pagemap.scan(self._fd, rest, **asked)
                pagemap.join_seam(regions, more)
                regions += more
            found.append(regions)
        pagemap.check_alive(self._fd)
        return found
