"""Where an arena goes: apart from every mapping, or the kernel merges it with one."""

import pytest

from ckpt.kernel.procfs import maps
from ckpt.process.arena import ARENA_SIZE, choose_place

MIB = 1 << 20
VSYSCALL = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n"


def vmas(*spans):
    text = "".join(f"{start:x}-{end:x} rw-p 00000000 00:00 0\n" for start, end in spans)
    return maps.parse_maps(text + VSYSCALL)


def test_it_lies_in_the_widest_hole_and_touches_nobody():
    narrow = (0x400000, 0x500000), (0x600000, 0x700000)
    top = (0x7F00_0000_0000, 0x7F00_0010_0000)
    at = choose_place(vmas(*narrow, top))
    assert narrow[1][1] + MIB <= at
    assert at + ARENA_SIZE + MIB <= top[0]


def test_it_lies_below_the_stack_and_not_below_the_vsyscall_page():
    stack = (0x7FFC_0000_0000, 0x7FFC_0002_1000)
    assert choose_place(vmas((0x400000, 0x500000), stack)) < stack[0]


@pytest.mark.parametrize("spans", [[], [(0x400000, 0x500000)]])
def test_without_a_hole_there_is_no_place(spans):
    assert choose_place(vmas(*spans)) is None


def test_a_hole_must_leave_room_on_both_sides():
    low = (0x400000, 0x500000)
    need = ARENA_SIZE + 2 * MIB
    fits = (low[1] + need, low[1] + need + MIB)
    assert choose_place(vmas(low, fits)) == low[1] + MIB
    too_near = (fits[0] - 4096, fits[1])
    assert choose_place(vmas(low, too_near)) is None
