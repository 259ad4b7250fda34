"""The promise: filters that may hand calls to a listener are told from those that cannot."""

import struct

import pytest

from ckpt.kernel.seccomp import iter_instructions, may_notify, pack_fprog, parse_mode

NOTIFY, ALLOW = 0x7FC0_0000, 0x7FFF_0000
RET_K, RET_A, LD_IMM, LD_ABS, ALU_OR, LDX_IMM = 0x06, 0x16, 0x00, 0x20, 0x44, 0x01


def program(*instructions):
    return b"".join(struct.pack("<HBBI", code, 0, 0, k) for code, k in instructions)


@pytest.mark.parametrize(
    ("raw", "notifies"),
    [
        (program((RET_K, ALLOW)), False),
        (program((RET_K, NOTIFY)), True),
        (program((RET_K, NOTIFY | 0xFFFF)), True),
        (program((LD_ABS, 0), (RET_K, ALLOW), (RET_K, NOTIFY)), True),
        (program((LD_IMM, NOTIFY), (RET_K, ALLOW)), False),
        (program((LD_IMM, NOTIFY), (RET_A, 0)), True),
        (program((LD_IMM, 1), (ALU_OR, NOTIFY), (RET_A, 0)), True),
        (program((LD_ABS, 0), (RET_A, 0)), False),
    ],
)
def test_what_may_notify(raw, notifies):
    assert may_notify(raw) is notifies


def test_instructions():
    (one,) = iter_instructions(struct.pack("<HBBI", 0x15, 1, 2, 0xFFFF_FFFF))
    assert (one.code, one.jt, one.jf, one.k) == (0x15, 1, 2, 0xFFFF_FFFF)
    with pytest.raises(ValueError, match="7 bytes"):
        list(iter_instructions(bytes(7)))


def test_a_packed_program_says_how_long_it_is():
    raw = pack_fprog(bytes(8 * 4096))
    assert len(raw) == 16
    assert int.from_bytes(raw[:2], "little") == 4096


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"Name:\tx\nNoNewPrivs:\t0\nSeccomp:\t2\nSeccomp_filters:\t3\nCpus:\t1\n", (2, 3)),
        (b"Name:\tx\nNoNewPrivs:\t0\nSeccomp:\t2\nSpeculation:\tx\n", (2, 0)),
        (b"Name:\tSeccomp:\t1\nSeccomp:\t0\nSeccomp_filters:\t0\n", (0, 0)),
        (b"Name:\tx\nNoNewPrivs:\t0\n", (0, 0)),
    ],
)
def test_mode_and_number(text, told):
    assert parse_mode(text) == told
