"""The promise: what a batch holds is what the calls say, and each reply finds its own memory."""

import errno
import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.process.remote import Call, In, InOut, Out, Reply, call, pack_batch, size_of
from ckpt.process.remote import unpack_replies as unpack
from ckpt.units import RemoteAddr

AT = RemoteAddr(0x7000_0000)


def entry(batch, index):
    """Return number, arguments and result word of a packed call."""
    return struct.unpack_from("<8Q", batch, index * arch.CALL_SIZE)


def memory(batch, addr, size):
    """Return what lies at an address once the batch lies at `AT`."""
    return batch[addr - AT : addr - AT + size]


def answered(batch, *values):
    """Return the batch as the loop leaves it: with these results."""
    after = bytearray(batch)
    for index, value in enumerate(values):
        struct.pack_into("<q", after, index * arch.CALL_SIZE + 56, value)
    return after


def test_plain_numbers():
    batch = pack_batch([call(NR.close, 7), call(NR.getpid)], AT)
    assert entry(batch, 0) == (NR.close, 7, 0, 0, 0, 0, 0, 0)
    assert entry(batch, 1) == (NR.getpid, 0, 0, 0, 0, 0, 0, 0)
    assert len(batch) == 2 * arch.CALL_SIZE


def test_negative_numbers_are_words():
    batch = pack_batch([call(NR.mmap, 0, 4096, 3, 0x22, -1, 0)], AT)
    assert entry(batch, 0)[5] == 0xFFFF_FFFF_FFFF_FFFF
    assert arch.unpack_args(batch, 0) == (0, 4096, 3, 0x22, 0xFFFF_FFFF_FFFF_FFFF, 0)


def test_what_is_read_lies_where_the_argument_points():
    batch = pack_batch([call(NR.write, 1, In(b"hello"), 5), call(NR.chdir, In(b"/\0"))], AT)
    assert memory(batch, entry(batch, 0)[2], 5) == b"hello"
    assert memory(batch, entry(batch, 1)[1], 2) == b"/\0"


def test_memory_begins_behind_the_table():
    batch = pack_batch([call(NR.getpid), call(NR.chdir, In(b"x"))], AT)
    assert entry(batch, 1)[1] == AT + 2 * arch.CALL_SIZE


def test_pointers_inside_of_data_are_resolved():
    raw = bytes(24)
    asked = call(NR.prctl, In(raw, ((8, b"first"), (16, b"second, which is longer"))))
    batch = pack_batch([asked], AT)
    pointers = struct.unpack("<3Q", memory(batch, entry(batch, 0)[1], 24))
    assert pointers[0] == 0
    assert memory(batch, pointers[1], 5) == b"first"
    assert memory(batch, pointers[2], 23) == b"second, which is longer"


def test_data_of_any_length_leaves_pointers_intact():
    asked = call(NR.prctl, In(bytes(17), ((0, b"a"),)), In(b"tail"))
    batch = pack_batch([asked], AT)
    (pointer,) = struct.unpack("<Q", memory(batch, entry(batch, 0)[1], 8))
    assert memory(batch, pointer, 1) == b"a"
    assert memory(batch, entry(batch, 0)[2], 4) == b"tail"


def test_replies_hold_value_and_memory():
    calls = [call(NR.getitimer, 0, Out(5)), call(NR.ioctl, 3, 4, InOut(b"abc")), call(NR.getpid)]
    batch = answered(pack_batch(calls, AT), 0, 1, 4711)
    for asked, filled in ((0, b"clock"), (1, b"XYZ")):
        addr = entry(batch, asked)[2 + asked]
        batch[addr - AT : addr - AT + len(filled)] = filled
    replies = unpack(calls, bytes(batch))
    assert [reply.value for reply in replies] == [0, 1, 4711]
    assert [reply.outs for reply in replies] == [(b"clock",), (b"XYZ",), ()]
    assert [reply.asked for reply in replies] == calls


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, 0), (4711, 0), (-1, 1), (-4095, 4095), (-4096, 0), (-(1 << 62), 0), (-errno.EBADF, 9)],
)
def test_what_counts_as_an_error(value, error):
    reply = Reply(call(NR.close, 3), value)
    assert reply.error == error
    assert reply.ok == (not error)


def test_a_reply_reads_like_strace():
    assert str(Reply(call(NR.dup, 3), 4)) == "dup(3) = 4"
    asked = call(NR.mmap, 0x7000_0000, 4096, In(b"x"))
    assert str(Reply(asked, -12)).startswith("mmap(0x70000000, 4096, &...) = ENOMEM (")


def test_an_errno_without_a_name_is_shown_as_it_is():
    assert "= 514 (" in str(Reply(call(NR.pause), -514))


memories = st.one_of(
    st.binary(max_size=40).map(In),
    st.tuples(st.binary(min_size=16, max_size=50), st.binary(max_size=40), st.binary(max_size=9))
    .map(lambda parts: In(parts[0], ((0, parts[1]), (8, parts[2]))))
    .filter(lambda memory: memory.data),
    st.integers(0, 70).map(Out),
    st.binary(max_size=40).map(InOut),
)
arguments = st.lists(st.one_of(st.integers(-5, 1 << 40), memories), max_size=6)
calls_of_any_kind = st.lists(arguments.map(lambda args: Call(NR.getpid, tuple(args))), max_size=9)


@given(calls_of_any_kind)
def test_size_is_the_size(calls):
    assert len(pack_batch(calls, AT)) == sum(map(size_of, calls))


@given(calls_of_any_kind)
def test_no_two_arguments_share_memory(calls):
    batch = pack_batch(calls, AT)
    spans = []
    for index, asked in enumerate(calls):
        for argument, word in zip(asked.args, entry(batch, index)[1:7], strict=False):
            if isinstance(argument, int):
                continue
            size = argument.size if isinstance(argument, Out) else len(argument.data)
            assert word % 16 == 0
            spans.append((word, word + size))
            if isinstance(argument, In):
                head = memory(batch, word, size)
                for offset, data in argument.pointers:
                    (pointer,) = struct.unpack_from("<Q", head, offset)
                    assert memory(batch, pointer, len(data)) == data
                    spans.append((pointer, pointer + len(data)))
    spans = sorted(span for span in spans if span[0] < span[1])
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert not spans or (spans[0][0] >= AT + len(calls) * arch.CALL_SIZE)
    assert not spans or spans[-1][1] <= AT + len(batch)


@given(calls_of_any_kind, st.data())
def test_each_reply_gets_what_was_left_where_its_argument_points(calls, data):
    batch = bytearray(pack_batch(calls, AT))
    expected = []
    for index, asked in enumerate(calls):
        value = data.draw(st.integers(-(1 << 63), (1 << 63) - 1))
        struct.pack_into("<q", batch, index * arch.CALL_SIZE + 56, value)
        outs = []
        for argument, word in zip(asked.args, entry(batch, index)[1:7], strict=False):
            if isinstance(argument, Out | InOut):
                size = argument.size if isinstance(argument, Out) else len(argument.data)
                filled = data.draw(st.binary(min_size=size, max_size=size))
                batch[word - AT : word - AT + size] = filled
                outs.append(filled)
        expected.append((value, tuple(outs)))
    replies = unpack(calls, bytes(batch))
    assert [(reply.value, reply.outs) for reply in replies] == expected
