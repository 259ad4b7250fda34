import ctypes
import errno
import mmap
import os

import pytest

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import PAGE_SIZE, readable_address, syscall, writable_address


def test_syscall_returns_the_result():
    assert syscall(NR.getpid) == os.getpid()


def test_syscall_raises_with_errno_and_text():
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        syscall(NR.close, -1)
    assert caught.value.errno == errno.EBADF


def test_syscall_raises_the_subclass_of_the_errno():
    with pytest.raises(ProcessLookupError):
        syscall(NR.kill, 0x7FFFFFFF, 0)


def test_arguments_are_64_bits_wide():
    with mmap.mmap(-1, PAGE_SIZE) as page:
        address, size = writable_address(page)
        assert address > 2**32
        page[:5] = b"hello"
        read_end, write_end = os.pipe()
        try:
            assert syscall(NR.write, write_end, address, 5) == 5
            assert os.read(read_end, 10) == b"hello"
            os.write(write_end, b"x")
            assert syscall(NR.read, read_end, address + 5, 1) == 1
        finally:
            os.close(read_end)
            os.close(write_end)
        assert page[:6] == b"hellox"
        assert size == PAGE_SIZE


def test_unsigned_arguments_pass():
    with pytest.raises(OSError, match="Invalid argument"):
        syscall(NR.madvise, 2**64 - PAGE_SIZE, 2 * PAGE_SIZE, 0)


def test_six_arguments_pass():
    address = syscall(
        NR.mmap, 0, PAGE_SIZE, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    assert syscall(NR.munmap, address, PAGE_SIZE) == 0


@pytest.mark.parametrize("kind", [bytearray, bytes, memoryview, ctypes.create_string_buffer])
def test_readable_address_is_where_the_bytes_are(kind):
    buffer = kind(b"some bytes")
    address, size = readable_address(buffer)
    assert size == len(buffer)
    assert ctypes.string_at(address, 10) == b"some bytes"


def test_address_of_a_slice_is_inside_the_whole():
    whole = bytearray(100)
    address, size = writable_address(memoryview(whole)[10:30])
    assert (address - writable_address(whole)[0], size) == (10, 20)


def test_buffer_is_let_go():
    buffer = bytearray(8)
    writable_address(buffer)
    buffer.extend(b"a bytearray that is exported cannot grow")


def test_read_only_buffer_is_not_writable():
    with pytest.raises(BufferError):
        writable_address(b"constant")


def test_scattered_buffer_has_no_address():
    with pytest.raises(BufferError):
        readable_address(memoryview(b"abcdef")[::2])
