import ctypes
import os

import pytest

from ckpt.kernel.libc import writable_address
from ckpt.kernel.prctl import EXE_FD_UNCHANGED, MmField, Prctl, prctl, prctl_mm_map


def test_reads_our_own_name():
    buffer = bytearray(16)
    prctl(Prctl.GET_NAME, writable_address(buffer)[0])
    with open(f"/proc/self/task/{os.getpid()}/comm", "rb") as file:
        assert file.read() == buffer.rstrip(b"\0") + b"\n"


def test_sets_and_reads_back():
    before = prctl(Prctl.GET_TIMERSLACK)
    try:
        prctl(Prctl.SET_TIMERSLACK, 123_456)
        assert prctl(Prctl.GET_TIMERSLACK) == 123_456
    finally:
        prctl(Prctl.SET_TIMERSLACK, before)


def test_refusals_have_an_errno():
    with pytest.raises(OSError, match="Invalid argument"):
        prctl(Prctl.SET_DUMPABLE, 77)


def test_the_kernel_knows_the_mm_map_by_our_size():
    size = ctypes.c_uint()
    prctl(Prctl.SET_MM, MmField.MAP_SIZE, ctypes.addressof(size))
    assert size.value == ctypes.sizeof(prctl_mm_map)
    assert ctypes.c_int32(EXE_FD_UNCHANGED).value == -1
