import mmap
import os
import random

import pytest

from ckpt.errors import TargetGone
from ckpt.kernel.process_vm import IOV_MAX, read_mem, readv, write_mem, writev
from ckpt.units import addr_range
from tests.kernel.children import ended, running

PAGE = mmap.PAGESIZE
N_PAGES = 3000

PATTERN = """
    memory = private_memory(3000)
    for page in range(3000):
        memory[page * PAGE : page * PAGE + 8] = (page + 1).to_bytes(8, "little")
    say(address_of(memory))
    while wait() == "show":
        say(memory[:PAGE * 3000].rstrip(b"\\0")[-40:].hex())
        say(memory[5 * PAGE : 5 * PAGE + 16].hex())
"""

PROTECTED = """
    libc = ctypes.CDLL(None)
    memory = private_memory(3)
    memory[0:5] = b"first"
    memory[PAGE : PAGE + 6] = b"second"
    memory[2 * PAGE : 2 * PAGE + 5] = b"third"
    start = address_of(memory)
    # The second page: no access at all (0), or write only (2), or read only (1).
    libc.mprotect(ctypes.c_void_p(start + PAGE), PAGE, {prot})
    say(start)
    wait()
    libc.mprotect(ctypes.c_void_p(start + PAGE), PAGE, 3)
    say(memory[PAGE : PAGE + 6].decode())
    wait()
"""


@pytest.fixture(scope="module")
def patterned():
    with running(PATTERN) as child:
        (start,) = child.heard()
        yield child.pid, start


def number_at(buffer, index):
    return int.from_bytes(buffer[index * PAGE : index * PAGE + 8], "little")


@pytest.mark.parametrize("read", [readv, read_mem])
def test_reads_thousands_of_scattered_pages_in_order(patterned, read):
    pid, start = patterned
    pages = list(range(N_PAGES))
    random.Random(1).shuffle(pages)
    assert len(pages) > 2 * IOV_MAX
    buffer = bytearray(N_PAGES * PAGE)
    ranges = [addr_range(start + page * PAGE, PAGE) for page in pages]
    assert read(pid, ranges, buffer) == N_PAGES * PAGE
    assert [number_at(buffer, index) - 1 for index in range(N_PAGES)] == pages


@pytest.mark.parametrize("read", [readv, read_mem])
def test_a_range_longer_than_one_iovec_is_whole(patterned, read):
    pid, start = patterned
    buffer = mmap.mmap(-1, N_PAGES * PAGE)
    assert read(pid, [addr_range(start, N_PAGES * PAGE)], buffer) == N_PAGES * PAGE
    assert [number_at(buffer, index) for index in range(N_PAGES)] == list(range(1, N_PAGES + 1))


@pytest.mark.parametrize("read", [readv, read_mem])
def test_nothing_to_read(patterned, read):
    pid, _ = patterned
    assert read(pid, [], bytearray(1)) == 0


@pytest.mark.parametrize("read", [readv, read_mem])
def test_a_buffer_that_is_too_small_is_refused(patterned, read):
    pid, start = patterned
    with pytest.raises(ValueError, match="8192 bytes do not fit into a buffer of 8191"):
        read(pid, [addr_range(start, PAGE)] * 2, bytearray(2 * PAGE - 1))


@pytest.mark.parametrize("read", [readv, read_mem])
def test_into_the_middle_of_a_buffer(patterned, read):
    pid, start = patterned
    buffer = bytearray(24)
    assert read(pid, [addr_range(start, 8)], memoryview(buffer)[8:16]) == 8
    assert buffer == bytes(8) + (1).to_bytes(8, "little") + bytes(8)


@pytest.mark.parametrize("prot", [0, 2])
def test_a_read_ends_where_a_page_may_not_be_read(prot):
    with running(PROTECTED.format(prot=prot)) as child:
        (start,) = child.heard()
        buffer = bytearray(3 * PAGE)
        whole = [addr_range(start, 3 * PAGE)]
        single = [addr_range(start + page * PAGE, PAGE) for page in range(3)]
        # x86 cannot forbid reading where writing is allowed, but the kernel's own check can.
        assert readv(child.pid, whole, buffer) == PAGE
        assert readv(child.pid, single, buffer) == PAGE
        assert readv(child.pid, single[1:], buffer) == 0
        assert buffer[:6] == b"first\0"


@pytest.mark.parametrize("prot", [0, 1, 2])
def test_mem_reads_and_writes_whatever_the_protection(prot):
    with running(PROTECTED.format(prot=prot)) as child:
        (start,) = child.heard()
        buffer = bytearray(3 * PAGE)
        assert read_mem(child.pid, [addr_range(start, 3 * PAGE)], buffer) == 3 * PAGE
        assert [bytes(buffer[page * PAGE :][:6]) for page in range(3)] == [
            b"first\0",
            b"second",
            b"third\0",
        ]
        assert write_mem(child.pid, [(start + PAGE, 2, 3)], b"..ABC") == 3
        child.tell()
        assert child.heard() == ["ABCond"]


def test_a_write_ends_where_a_page_may_not_be_written():
    with running(PROTECTED.format(prot=1)) as child:
        (start,) = child.heard()
        pieces = [(start + page * PAGE, page, 1) for page in range(3)]
        assert writev(child.pid, pieces, b"xyz") == 1
        buffer = bytearray(3)
        readv(child.pid, [addr_range(start + page * PAGE, 1) for page in range(3)], buffer)
        assert buffer == b"xst"


@pytest.mark.parametrize("move", [(readv, writev), (read_mem, write_mem)])
def test_unmapped_memory_moves_nothing(patterned, move):
    read, write = move
    pid, start = patterned
    nowhere = addr_range(PAGE, 8)  # below every mapping (vm.mmap_min_addr)
    assert read(pid, [nowhere, addr_range(start, 8)], bytearray(16)) == 0
    assert write(pid, [(PAGE, 0, 1)], b"x") == 0


@pytest.mark.parametrize("write", [writev, write_mem])
def test_writes_scattered_pieces(write):
    pages = list(range(0, N_PAGES, 2))
    random.Random(2).shuffle(pages)
    source = b"".join(page.to_bytes(8, "big") for page in range(N_PAGES))
    with running(PATTERN) as child:
        (start,) = child.heard()
        pieces = [(start + page * PAGE + 100, page * 8, 8) for page in pages]
        assert len(pieces) > IOV_MAX
        assert write(child.pid, pieces, source) == 8 * len(pieces)
        buffer = bytearray(N_PAGES * 8)
        ranges = [addr_range(start + page * PAGE + 100, 8) for page in range(N_PAGES)]
        readv(child.pid, ranges, buffer)
        for page in range(N_PAGES):
            expected = page if page % 2 == 0 else 0
            assert int.from_bytes(buffer[page * 8 : page * 8 + 8], "big") == expected


@pytest.mark.parametrize("write", [writev, write_mem])
def test_a_long_piece_is_whole(write):
    data = random.Random(3).randbytes(5 * (1 << 20) + 17)
    with running(PATTERN) as child:
        (start,) = child.heard()
        assert write(child.pid, [(start, 7, len(data) - 7)], data) == len(data) - 7
        buffer = bytearray(len(data))
        readv(child.pid, [addr_range(start, len(data) - 7)], buffer)
        assert buffer[: len(data) - 7] == data[7:]


@pytest.mark.parametrize("write", [writev, write_mem])
@pytest.mark.parametrize("piece", [(0, 5, 4), (0, -1, 2), (0, 0, 9)])
def test_a_piece_beyond_the_source_is_refused(write, piece):
    with pytest.raises(ValueError, match="beyond a buffer of 8"):
        write(os.getpid(), [piece], bytes(8))


def test_an_ended_process_is_gone():
    with ended() as pid:
        with pytest.raises(TargetGone) as caught:
            readv(pid, [addr_range(PAGE, 8)], bytearray(8))
        assert caught.value.pid == pid
        with pytest.raises(TargetGone):
            writev(pid, [(PAGE, 0, 1)], b"x")


def test_a_process_that_never_was_is_gone():
    with pytest.raises(TargetGone):
        read_mem(0x7FFFFFFF, [addr_range(PAGE, 8)], bytearray(8))
    with pytest.raises(TargetGone):
        write_mem(0x7FFFFFFF, [(PAGE, 0, 1)], b"x")
