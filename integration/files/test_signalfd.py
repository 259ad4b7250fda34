"""Signals to be read, by the mask of each descriptor."""

import ctypes
import os
import signal
import struct

from ckpt.kernel.arch import NR
from ckpt.process.remote import In, call
from integration.files.processes import brought_back

libc = ctypes.CDLL(None, use_errno=True)
SIGNALFD_SIGINFO_BYTES = 128


def make(mask, flags=0):
    """Make a signalfd of a 64-bit mask, as the kernel has it."""
    raw = ctypes.create_string_buffer(struct.pack("<Q", mask))
    fd = libc.syscall(NR.signalfd4, -1, raw, 8, flags)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def bit(number):
    return 1 << number - 1


def test_masks_and_flags_come_back():
    everything = 2**64 - 1

    def prepare():
        make(bit(signal.SIGUSR1) | bit(signal.SIGRTMAX))  # 3
        make(0, os.O_NONBLOCK)  # 4
        make(everything, os.O_CLOEXEC)  # 5
        os.dup2(3, 30)

    with brought_back(prepare) as (record, built):
        assert [one.record.mask for one in record.descriptions if one.kind == "signalfd"] == [
            bit(signal.SIGUSR1) | bit(signal.SIGRTMAX),
            0,
            everything & ~bit(signal.SIGKILL) & ~bit(signal.SIGSTOP),
        ]
        assert built.capture() == record


def test_it_reads_the_signals_of_the_restored_process():
    def prepare():
        make(bit(signal.SIGUSR1), os.O_NONBLOCK)  # 3

    with brought_back(prepare) as (_, built):
        blocked = In(struct.pack("<Q", bit(signal.SIGUSR1)))
        calls = [
            call(NR.rt_sigprocmask, 0, blocked, 0, 8),
            call(NR.kill, built.pid, signal.SIGUSR1),
        ]
        assert all(reply.ok for reply in built.run(calls))
        read = built.read(3, SIGNALFD_SIGINFO_BYTES)
        assert struct.unpack_from("<I", read) == (signal.SIGUSR1,)
