"""The promise: a frame is written only where no function has anything, and where it can help."""

import pytest

from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.procfs import maps
from ckpt.process import gadgets
from ckpt.process.task import Task
from ckpt.process.way_back import find_way_back
from ckpt.units import Tid

STACK = (0x7FFC_0000_0000, 0x7FFC_0002_1000)
LIBC = "7f0000000000-7f0000010000 r-xp 00001000 08:01 77 /lib/libc.so.6\n"
PLAIN = b"Name:\tx\nx86_Thread_features:\t\n"


@pytest.fixture(autouse=True)
def learnt(monkeypatch):
    (libc,) = maps.parse_maps(LIBC)
    monkeypatch.setattr(gadgets, "_found", {gadgets._key_of(libc): (0x20, (0x40, b"code"))})


def stack(perms="rw-p", name="[stack]"):
    return f"{STACK[0]:x}-{STACK[1]:x} {perms} 00000000 00:00 0 {name}\n"


def find(rsp, text=None, status=PLAIN):
    task = Task(Tid(7))
    task.take_state(arch.Registers(rsp=rsp), 0, None, bytes(2696))
    task.status_text = status
    return find_way_back(task, maps.parse_maps(LIBC + stack() if text is None else text))


def test_it_lies_below_the_red_zone_and_what_an_interrupted_call_may_use():
    rsp = STACK[1] - 0x1238
    way = find(rsp)
    end = way.frame_at + len(way.frame)
    assert rsp - 512 < end <= rsp - arch.RED_ZONE - 64
    assert way.gadgets.call_at == 0x7F00_0000_0020
    assert way.frame[:8] == (0x7F00_0000_0040).to_bytes(8, "little")


def test_it_lies_on_the_stack_as_a_whole():
    size = len(find(STACK[1] - 8).frame)
    assert find(STACK[0] + size + 512) is not None
    assert find(STACK[0] + size) is None
    assert find(STACK[0] + 64) is None


@pytest.mark.parametrize("rsp", [STACK[0] - 0x8000, STACK[1] + 0x8000, 0, 8])
def test_there_is_none_on_a_stack_that_a_program_has_made(rsp):
    assert find(rsp) is None


@pytest.mark.parametrize(
    "text",
    [
        stack(),
        LIBC,
        LIBC + stack("r--p"),
        LIBC + stack("rw-s"),
        LIBC + stack(name="[heap]"),
        LIBC.replace(" 77 ", " 78 ") + stack(),
        LIBC.replace("r-xp", "r--p") + stack(),
    ],
    ids=["no code", "no stack", "read-only", "shared", "heap", "another file", "not executable"],
)
def test_there_is_none_without_stack_or_code(text):
    assert find(STACK[1] - 0x1000, text) is None


def test_there_is_none_with_a_shadow_stack():
    assert find(STACK[1] - 0x1000, status=b"x86_Thread_features:\tshstk wrss\n") is None
