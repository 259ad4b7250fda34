"""What /proc tells of a sleeping thread, read from captured text."""

import os

import pytest

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address
from ckpt.process.sleeping import (
    BlockedCall,
    parse_n_sleeps,
    parse_stack,
    parse_syscall,
    read_call,
)
from ckpt.units import Tid

POLL_STACK = """\
[<0>] poll_schedule_timeout.constprop.0+0x37/0x90
[<0>] do_sys_poll+0x400/0x590
[<0>] do_restart_poll+0x43/0x90
[<0>] do_syscall_64+0x71/0x280
[<0>] entry_SYSCALL_64_after_hwframe+0x76/0x7e
"""
FUTEX_STACK = """\
[<0>] futex_do_wait+0x46/0x90
[<0>] __futex_wait+0x8a/0x100
[<0>] futex_wait+0x67/0x120
[<0>] futex_wait_restart+0x47/0x80
[<0>] do_syscall_64+0x71/0x280
[<0>] entry_SYSCALL_64_after_hwframe+0x76/0x7e
"""
NANOSLEEP_STACK = """\
[<0>] do_syscall_64+0x71/0x280
[<0>] entry_SYSCALL_64_after_hwframe+0x76/0x7e
"""
CPU_SLEEP_STACK = """\
[<0>] do_cpu_nanosleep+0x9f/0x1f0
[<0>] posix_cpu_nsleep_restart+0x2d/0x50
[<0>] do_syscall_64+0x71/0x280
[<0>] entry_SYSCALL_64_after_hwframe+0x76/0x7e
"""
READ_STACK = """\
[<0>] anon_pipe_read+0x366/0x410
[<0>] do_syscall_64+0x71/0x280
[<0>] entry_SYSCALL_64_after_hwframe+0x76/0x7e
"""


def test_a_blocked_call_is_read():
    text = "219 0x7f5325f4c160 0x1 0x186a0 0x1 0x0 0x0 0x7ffed1a4c8b8 0x7f532611a230\n"
    assert parse_syscall(text) == BlockedCall(
        219, (0x7F5325F4C160, 1, 100_000, 1, 0, 0), 0x7FFED1A4C8B8, 0x7F532611A230
    )


@pytest.mark.parametrize("text", ["running\n", "-1 0x7ffed1a4c8b8 0x7f532611a230\n", ""])
def test_a_thread_in_no_call_is_in_none(text):
    assert parse_syscall(text) is None


@pytest.mark.parametrize(
    ("stack", "call"),
    [
        (POLL_STACK, NR.poll),
        (FUTEX_STACK, NR.futex),
        (NANOSLEEP_STACK, NR.nanosleep),
        (CPU_SLEEP_STACK, NR.clock_nanosleep),
        (READ_STACK, None),
        ("", None),
    ],
)
def test_the_stack_tells_which_call_is_continued(stack, call):
    assert parse_stack(stack) == call


def test_the_number_of_sleeps_is_read():
    text = "cat (1, #threads: 1)\n---\nnr_voluntary_switches   :    12\nnr_switches : 13\n"
    assert parse_n_sleeps(text) == 12
    assert parse_n_sleeps("policy : 0\n") is None


@pytest.mark.parametrize(
    ("code", "call"),
    [
        (b"\x90\x90\xb8\x07\0\0\0\x0f\x05", NR.poll),
        (b"\x48\xc7\xc0\x23\0\0\0\x0f\x05", NR.nanosleep),
        (b"\x90\x90\xb8\x00\0\0\0\x0f\x05", None),
        (b"\x90\x90\xb8\x07\0\0\0\x90\x90", None),
        (b"\x48\x89\xf8\x90\x90\x90\x90\x0f\x05", None),
    ],
)
def test_the_code_before_a_system_call_tells_its_number(code, call):
    assert read_call(Tid(os.getpid()), readable_address(code)[0] + len(code)) == call


def test_code_that_is_not_mapped_tells_nothing():
    assert read_call(Tid(os.getpid()), 0x1000) is None
