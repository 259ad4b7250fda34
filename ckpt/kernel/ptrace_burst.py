"""ptrace requests on many threads in one go: the same as in `ptrace.py`, laid out as a `Burst`.

The requests are made in the order in which they were added; one that fails has a negative errno for
its result and does not keep the next from being made.

Source: ptrace(2), include/uapi/linux/ptrace.h.
"""

import ctypes

from ckpt.kernel.arch import NR
from ckpt.kernel.arch.x86_64 import Registers
from ckpt.kernel.binding import iovec_struct
from ckpt.kernel.burst import Burst
from ckpt.kernel.ptrace import Option, RegSet, Request, raw_rseq_configuration
from ckpt.units import Tid

_SIGSET_BYTES = 8


class PtraceBurst(Burst):
    """A table of requests, and the buffers that they need."""

    def __init__(self) -> None:
        """Begin with no request."""
        super().__init__()
        self._kept: list[object] = []

    def _request(self, request: Request, tid: Tid, addr: int = 0, data: int = 0) -> None:
        self.add(NR.ptrace, request, tid, addr, data)

    def _address_of(
        self, buffer: "ctypes.Structure | ctypes._SimpleCData[int] | ctypes.Array[ctypes.c_char]"
    ) -> int:
        self._kept.append(buffer)
        return ctypes.addressof(buffer)

    def seize(self, tid: Tid, options: Option) -> None:
        """See `ptrace.seize`."""
        self._request(Request.SEIZE, tid, 0, options)

    def interrupt(self, tid: Tid) -> None:
        """See `ptrace.interrupt`."""
        self._request(Request.INTERRUPT, tid)

    def cont(self, tid: Tid) -> None:
        """See `ptrace.cont`."""
        self._request(Request.CONT, tid)

    def detach(self, tid: Tid) -> None:
        """See `ptrace.detach`."""
        self._request(Request.DETACH, tid)

    def set_registers(self, tid: Tid, registers: Registers) -> None:
        """See `ptrace.set_registers`."""
        vector = iovec_struct(self._address_of(registers), ctypes.sizeof(registers))
        self._request(Request.SETREGSET, tid, RegSet.PRSTATUS, self._address_of(vector))

    def get_registers(self, tid: Tid) -> Registers:
        """Return where the registers will be when it has run, see `ptrace.get_registers`."""
        registers = Registers()
        vector = iovec_struct(self._address_of(registers), ctypes.sizeof(registers))
        self._request(Request.GETREGSET, tid, RegSet.PRSTATUS, self._address_of(vector))
        return registers

    def get_xstate(self, tid: Tid, size: int) -> "ctypes.Array[ctypes.c_char]":
        """Return where the XSAVE area of `size` bytes will be, see `ptrace.get_xstate`."""
        buffer = ctypes.create_string_buffer(size)
        vector = iovec_struct(self._address_of(buffer), size)
        self._request(Request.GETREGSET, tid, RegSet.X86_XSTATE, self._address_of(vector))
        return buffer

    def get_rseq_configuration(self, tid: Tid) -> raw_rseq_configuration:
        """Return where the registration will be, see `ptrace.get_rseq_configuration`."""
        raw = raw_rseq_configuration()
        size = ctypes.sizeof(raw)
        self._request(Request.GET_RSEQ_CONFIGURATION, tid, size, self._address_of(raw))
        return raw

    def set_sigmask(self, tid: Tid, mask: int) -> None:
        """See `ptrace.set_sigmask`."""
        word = self._address_of(ctypes.c_uint64(mask))
        self._request(Request.SETSIGMASK, tid, _SIGSET_BYTES, word)

    def get_sigmask(self, tid: Tid) -> ctypes.c_uint64:
        """Return where the blocked signals will be when it has run, see `ptrace.get_sigmask`."""
        mask = ctypes.c_uint64()
        self._request(Request.GETSIGMASK, tid, _SIGSET_BYTES, self._address_of(mask))
        return mask
