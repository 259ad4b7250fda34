"""ptrace requests on many threads in one go: the same as in `ptrace.py`, laid out as a `Burst`.

The requests are made in the order in which they were added; one that fails has a negative errno for
its result and does not keep the next from being made. `StopBurst` hears of many threads at once
whether they have stopped.

Source: ptrace(2), waitid(2), include/uapi/linux/ptrace.h.
"""

import ctypes
import os
import struct
from collections.abc import Iterable

from ckpt.kernel.arch import NR
from ckpt.kernel.arch.x86_64 import Registers
from ckpt.kernel.burst import Burst, BurstWithRoom
from ckpt.kernel.libc import writable_address
from ckpt.kernel.ptrace import (
    SIGINFO_SIZE,
    Option,
    RegSet,
    Request,
    raw_rseq_configuration,
    word_of_stop,
)
from ckpt.units import Tid

_SIGSET_BYTES = 8
_IOVEC = struct.Struct("<QQ")
_MASK = struct.Struct("<Q")


class PtraceBurst(BurstWithRoom):
    """A table of requests, and the memory that they need."""

    def _request(self, request: Request, tid: Tid, addr: int = 0, data: int = 0) -> None:
        self.add(NR.ptrace, request, tid, addr, data)

    def _add_register_set(
        self, request: Request, tid: Tid, which: RegSet, n_bytes: int
    ) -> tuple[bytearray, int]:
        memory, at, address = self.take(_IOVEC.size + n_bytes)
        _IOVEC.pack_into(memory, at, address + _IOVEC.size, n_bytes)
        self.add(NR.ptrace, request, tid, which, address)
        return memory, at + _IOVEC.size

    def seize(self, tid: Tid, options: Option) -> None:
        """See `ptrace.seize`."""
        self._request(Request.SEIZE, tid, 0, options)

    def interrupt(self, tid: Tid) -> None:
        """See `ptrace.interrupt`."""
        self._request(Request.INTERRUPT, tid)

    def cont(self, tid: Tid) -> None:
        """See `ptrace.cont`."""
        self._request(Request.CONT, tid)

    def cont_to_syscall(self, tid: Tid) -> None:
        """See `ptrace.cont_to_syscall`."""
        self._request(Request.SYSCALL, tid)

    def detach(self, tid: Tid) -> None:
        """See `ptrace.detach`."""
        self._request(Request.DETACH, tid)

    def set_registers(self, tid: Tid, registers: Registers) -> None:
        """See `ptrace.set_registers`; they are copied now."""
        size = ctypes.sizeof(registers)
        memory, at = self._add_register_set(Request.SETREGSET, tid, RegSet.PRSTATUS, size)
        memory[at : at + size] = registers

    def get_registers(self, tid: Tid) -> Registers:
        """Return where the registers will be when it has run, see `ptrace.get_registers`."""
        size = ctypes.sizeof(Registers)
        memory, at = self._add_register_set(Request.GETREGSET, tid, RegSet.PRSTATUS, size)
        registers: Registers = Registers.from_buffer(memory, at)
        return registers

    def get_xstate(self, tid: Tid, size: int) -> memoryview:
        """Return where the XSAVE area of `size` bytes will be, see `ptrace.get_xstate`."""
        memory, at = self._add_register_set(Request.GETREGSET, tid, RegSet.X86_XSTATE, size)
        return memoryview(memory)[at : at + size]

    def get_rseq_configuration(self, tid: Tid) -> raw_rseq_configuration:
        """Return where the registration will be, see `ptrace.get_rseq_configuration`."""
        size = ctypes.sizeof(raw_rseq_configuration)
        memory, at, address = self.take(size)
        self._request(Request.GET_RSEQ_CONFIGURATION, tid, size, address)
        return raw_rseq_configuration.from_buffer(memory, at)

    def set_sigmask(self, tid: Tid, mask: int) -> None:
        """See `ptrace.set_sigmask`."""
        memory, at, address = self.take(_SIGSET_BYTES)
        _MASK.pack_into(memory, at, mask)
        self._request(Request.SETSIGMASK, tid, _SIGSET_BYTES, address)

    def get_sigmask(self, tid: Tid) -> ctypes.c_uint64:
        """Return where the blocked signals will be when it has run, see `ptrace.get_sigmask`."""
        memory, at, address = self.take(_SIGSET_BYTES)
        self._request(Request.GETSIGMASK, tid, _SIGSET_BYTES, address)
        return ctypes.c_uint64.from_buffer(memory, at)


_WORDS = SIGINFO_SIZE // 4
_SI_PID, _SI_STATUS = 4, 6
"""Which words of a `siginfo_t` of SIGCHLD these are."""


class StopBurst:
    """Asks many traced threads at once whether they have stopped; never takes the end of one."""

    def __init__(self, tids: Iterable[Tid]) -> None:
        """Lay out the questions."""
        self._tids = list(tids)
        self._infos = bytearray(b"\0") * (SIGINFO_SIZE * len(self._tids))
        address, _ = writable_address(self._infos) if self._tids else (0, 0)
        self._calls = Burst()
        options = os.WSTOPPED | os.WNOHANG
        for index, tid in enumerate(self._tids):
            self._calls.add(NR.waitid, os.P_PID, tid, address + index * SIGINFO_SIZE, options, 0)

    def take(self) -> dict[Tid, int]:
        """Return the threads that have stopped since they were last asked.

        Shape:  by thread, the status word that waitpid would give; see `parse_wait_status`.
        """
        results = self._calls.run()
        words = memoryview(self._infos).cast("I")
        pids, statuses = words[_SI_PID::_WORDS], words[_SI_STATUS::_WORDS]
        return {
            tid: word_of_stop(status)
            for tid, result, pid, status in zip(
                self._tids, results, pids.tolist(), statuses.tolist(), strict=True
            )
            if result == 0 and pid
        }
