"""The wrapped msgpack: what goes in comes out, and nothing hostile gets through."""

import os
from array import array

import msgpack
import pytest

from ckpt.image.codec import pack, pack_column, unpack, unpack_column


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -1, 2**64 - 1, -(2**63)], "b": {"c": None, "d": True}},
        {"time": 1700000000.123456789, "tiny": 5e-324},
        {"bytes": b"\xff\x00", "text": "ü", "empty": b""},
        {"path": "/tmp/\udcff\udc80"},
        {b"key": 1},
    ],
)
def test_values_come_back(value):
    assert unpack(pack(value)) == value


def test_a_path_that_is_no_utf8_keeps_its_bytes():
    raw = b"/tmp/\xff\xfe-name"
    assert os.fsencode(unpack(pack(os.fsdecode(raw)))) == raw


def test_tuples_come_back_as_lists():
    assert unpack(pack({"t": (1, (2, 3))})) == {"t": [1, [2, 3]]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid msgpack"),
        (pack({"a": 1}) + b"\x00", "not valid msgpack"),
        (pack({"a": "long enough"})[:-3], "not valid msgpack"),
        (b"\xc1", "FormatError"),
        (b"\x91" * 5000 + b"\x00", "not valid msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not valid msgpack"),
        (b"\xdf\x7f\xff\xff\xff", "not valid msgpack"),
        (b"\xc6\xff\xff\xff\xff", "not valid msgpack"),
        (msgpack.packb({1: 2}), "not valid msgpack"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "extension of type 5"),
    ],
)
def test_hostile_bytes_are_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        unpack(data)


def test_the_built_in_extension_is_only_a_number():
    assert unpack(msgpack.packb(msgpack.Timestamp(1, 5))) == 1_000_000_005


def test_a_bug_of_the_caller_is_not_hidden():
    with pytest.raises(TypeError):
        pack({"a": object()})


def test_columns_are_little_endian():
    column = array("I", [1, 0x01020304])
    assert pack_column(column) == b"\x01\0\0\0\x04\x03\x02\x01"
    assert unpack_column("I", pack_column(column)) == column


def test_a_column_is_whole():
    with pytest.raises(ValueError, match="multiple"):
        unpack_column("Q", b"1234567")
