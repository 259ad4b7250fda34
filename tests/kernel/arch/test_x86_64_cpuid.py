import struct

import pytest

from ckpt.kernel import ptrace
from ckpt.kernel.arch.x86_64_cpuid import cpuid, xsave_bytes
from tests.kernel.children import running


def cpuinfo(field):
    with open("/proc/cpuinfo") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == field:
                return value.strip()
    raise KeyError(field)


def test_the_vendor_is_that_of_cpuinfo():
    _, ebx, ecx, edx = cpuid(0)
    assert struct.pack("<III", ebx, edx, ecx).decode() == cpuinfo("vendor_id")


@pytest.mark.parametrize(
    ("leaf", "register", "bit", "flag"),
    [(1, 2, 26, "xsave"), (1, 2, 28, "avx"), (7, 1, 5, "avx2"), (7, 1, 16, "avx512f")],
)
def test_flags_are_those_of_cpuinfo(leaf, register, bit, flag):
    assert bool(cpuid(leaf)[register] >> bit & 1) == (flag in cpuinfo("flags").split())


def test_the_xsave_area_is_as_large_as_ptrace_says():
    with running("say('ready'); wait()") as child:
        child.heard()
        ptrace.seize(child.pid, ptrace.Option(0))
        ptrace.interrupt(child.pid)
        ptrace.wait(child.pid)
        assert len(ptrace.get_xstate(child.pid)) == xsave_bytes()
        ptrace.detach(child.pid)
