"""Every file that cannot be captured is named, and the process is left alone."""

import ctypes
import os
import struct

import pytest

from ckpt.kernel.arch import NR
from integration.files.processes import look, opened_by

libc = ctypes.CDLL(None, use_errno=True)
_BPF_MAP_CREATE, _BPF_PROG_LOAD = 0, 5
_BPF_MAP_TYPE_ARRAY, _BPF_PROG_TYPE_SOCKET_FILTER = 2, 1
_PERF_TYPE_SOFTWARE, _PERF_COUNT_SW_TASK_CLOCK = 1, 1
_LANDLOCK_ACCESS_FS_EXECUTE = 1


def syscall(nr, *args):
    fd = libc.syscall(nr, *args)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def fanotify():
    return syscall(NR.fanotify_init, 0, os.O_RDONLY)


def bpf_map():
    attr = struct.pack("<IIII", _BPF_MAP_TYPE_ARRAY, 4, 4, 1).ljust(128, b"\0")
    return syscall(NR.bpf, _BPF_MAP_CREATE, attr, len(attr))


def bpf_program():
    code = ctypes.create_string_buffer(bytes.fromhex("b700000000000000 9500000000000000"))
    gpl = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "<IIQQ", _BPF_PROG_TYPE_SOCKET_FILTER, 2, ctypes.addressof(code), ctypes.addressof(gpl)
    ).ljust(128, b"\0")
    return syscall(NR.bpf, _BPF_PROG_LOAD, attr, len(attr))


def io_uring():
    return syscall(NR.io_uring_setup, 4, ctypes.create_string_buffer(120))


def userfaultfd():
    return syscall(NR.userfaultfd, os.O_CLOEXEC)


def performance_counter():
    attr = struct.pack("<IIQ", _PERF_TYPE_SOFTWARE, 128, _PERF_COUNT_SW_TASK_CLOCK)
    attr = attr.ljust(128, b"\0")
    return syscall(NR.perf_event_open, attr, 0, -1, -1, 0)


def landlock():
    return syscall(444, struct.pack("<QQ", _LANDLOCK_ACCESS_FS_EXECUTE, 0), 16, 0)


def mount_to_be():
    return syscall(430, b"tmpfs", 0)


CASES = {
    fanotify: "is a fanotify group, whose marks and unanswered questions cannot be moved",
    bpf_map: "is a map of BPF, which lives in the kernel and would have to be loaded anew",
    bpf_program: "is a program of BPF, which lives in the kernel and would have to be loaded anew",
    io_uring: "is an io_uring, whose requests under way and buffers the kernel holds",
    userfaultfd: "is a userfaultfd: the process handles page faults itself",
    performance_counter: "is a performance counter, which is not supported",
    landlock: "is a ruleset of Landlock, which is not supported",
    mount_to_be: "is a file system about to be mounted (fsopen), which is not supported",
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_it_is_named(make):
    with opened_by(make) as pid:
        (finding,) = look(pid)
    assert finding.startswith("fd 3 (")
    assert f"): {CASES[make]}" in finding


def test_all_are_named_together():
    def prepare():
        fanotify()
        io_uring()
        performance_counter()

    with opened_by(prepare) as pid:
        assert [line.split(" (")[0] for line in look(pid)] == ["fd 3", "fd 4", "fd 5"]
