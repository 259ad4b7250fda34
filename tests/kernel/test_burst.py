"""Many calls in one go: order, results, errors; and the same without machine code."""

import errno
import mmap
import os

import pytest

from ckpt.kernel import burst
from ckpt.kernel.arch import NR
from ckpt.kernel.burst import Burst, run_one_by_one
from ckpt.kernel.libc import writable_address


@pytest.fixture(params=["machine code", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "one by one":
        monkeypatch.setattr(burst, "_runner", lambda: run_one_by_one)
    else:
        assert burst._runner() is not run_one_by_one
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_calls_are_made_in_their_order() -> None:
    read_end, write_end = os.pipe()
    texts = [bytearray(b"one"), bytearray(b"two"), bytearray(b"three")]
    try:
        calls = Burst()
        for text in texts:
            calls.add(NR.write, write_end, *writable_address(text))
        assert calls.run() == [3, 3, 5]
        assert os.read(read_end, 100) == b"onetwothree"
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.usefixtures("way")
def test_a_failed_call_has_its_errno_and_the_next_are_made() -> None:
    calls = Burst()
    calls.add(NR.getpid)
    calls.add(NR.close, -1)
    calls.add(NR.getpid)
    assert calls.run() == [os.getpid(), -errno.EBADF, os.getpid()]


@pytest.mark.usefixtures("way")
def test_it_may_be_run_again_and_a_result_is_of_the_last_run() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    calls = Burst()
    calls.add(NR.close, fd)
    assert calls.run() == [0]
    assert calls.run() == [-errno.EBADF]


@pytest.mark.usefixtures("way")
def test_six_arguments_arrive() -> None:
    calls = Burst()
    prot, flags = mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    calls.add(NR.mmap, 0, mmap.PAGESIZE, prot, flags, -1, 1)  # an offset that is no page's
    calls.add(NR.mmap, 0, mmap.PAGESIZE, prot, flags, -1, 0)
    refused, address = calls.run()
    assert refused == -errno.EINVAL
    unmap = Burst()
    unmap.add(NR.munmap, address, mmap.PAGESIZE)
    assert unmap.run() == [0]


def test_nothing_to_do_is_nothing_done() -> None:
    calls = Burst()
    assert len(calls) == 0
    assert list(calls.run()) == []


@pytest.mark.usefixtures("way")
def test_a_call_can_be_replaced():
    calls = Burst()
    for _ in range(3):
        calls.add(NR.close, -1)
    calls.replace(1, NR.getpid)
    assert calls.run() == [-errno.EBADF, os.getpid(), -errno.EBADF]
