"""The promise: a frame is written only where no function has anything, and where it can help."""

import ctypes
import mmap
import os

import pytest

from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.procfs import maps
from ckpt.process import gadgets
from ckpt.process.task import Task
from ckpt.process.way_back import find_way_back
from ckpt.units import Pid, Tid

PLAIN = b"Name:\tx\nx86_Thread_features:\t\n"
BACK = arch.SIGRETURN_CODES[0]
IN_CALL, IN_BACK = 0x20, 0x40


class Area:
    """Memory of ours that plays a mapping of the target."""

    def __init__(self, size):
        self.memory = mmap.mmap(-1, size)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.end = self.start + size

    def line(self, perms, inode, name):
        return f"{self.start:x}-{self.end:x} {perms} 00001000 08:01 {inode} {name}\n"


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch):
    monkeypatch.setattr(gadgets, "_found", {})


@pytest.fixture
def code():
    area = Area(0x1000)
    area.memory[IN_CALL : IN_CALL + 3] = arch.SYSCALL_RET
    area.memory[IN_BACK : IN_BACK + len(BACK)] = BACK
    return area


@pytest.fixture
def stack():
    area = Area(0x8000)
    area.memory[:] = b"old!" * 0x2000
    return area


def text_of(code, stack, perms="rw-p", name="[stack]"):
    return code.line("r-xp", 77, "/lib/libc.so.6") + stack.line(perms, 0, name)


def find(text, rsp, status=PLAIN):
    vmas = maps.parse_maps(text)
    gadgets._search(Pid(os.getpid()), vmas)
    task = Task(Tid(os.getpid()))
    task.take_state(arch.Registers(rsp=rsp), 0, None, bytes(2696))
    task.status_text = status
    return find_way_back(task, vmas)


def test_it_lies_below_the_red_zone_and_what_an_interrupted_call_may_use(code, stack):
    rsp = stack.end - 0x1238
    way = find(text_of(code, stack), rsp)
    end = way.frame_at + len(way.frame)
    assert rsp - 512 < end <= rsp - arch.RED_ZONE - 64
    assert way.call_at == code.start + IN_CALL
    assert way.frame[:8] == (code.start + IN_BACK).to_bytes(8, "little")
    assert way.stood == b"old!" * (len(way.frame) // 4)


def test_it_lies_on_the_stack_as_a_whole(code, stack):
    text = text_of(code, stack)
    size = len(find(text, stack.end - 8).frame)
    assert find(text, stack.start + size + 512) is not None
    assert find(text, stack.start + size) is None
    assert find(text, stack.start + 64) is None


def test_there_is_none_on_a_stack_that_a_program_has_made(code, stack):
    text = text_of(code, stack)
    for rsp in (stack.start - 0x8000, stack.end + 0x8000, 0, 8):
        assert find(text, rsp) is None


def test_there_is_none_on_memory_that_is_not_the_main_stack_or_not_its_own(code, stack):
    for perms, name in [("rw-p", "[heap]"), ("r--p", "[stack]"), ("rw-s", "[stack]")]:
        assert find(text_of(code, stack, perms, name), stack.end - 0x1000) is None
    assert find(code.line("r-xp", 77, "/lib/libc.so.6"), stack.end - 0x1000) is None


@pytest.mark.parametrize("perms", ["r--p", "rwxp", "--xp"])
def test_there_is_none_without_code_that_stays(code, stack, perms):
    text = code.line(perms, 77, "/lib/libc.so.6") + stack.line("rw-p", 0, "[stack]")
    assert find(text, stack.end - 0x1000) is None


@pytest.mark.parametrize("at", [IN_CALL, IN_BACK])
def test_there_is_none_when_the_code_is_another_than_what_was_learnt(code, stack, at):
    text = text_of(code, stack)
    assert find(text, stack.end - 0x1000) is not None
    code.memory[at] = 0xCC
    assert find(text, stack.end - 0x1000) is None


def test_there_is_none_with_a_shadow_stack(code, stack):
    status = b"x86_Thread_features:\tshstk wrss\n"
    assert find(text_of(code, stack), stack.end - 0x1000, status) is None
