import errno
import os
import signal

import pytest

from ckpt.kernel.arch import NR
from ckpt.kernel.clone3 import (
    CLONE_ARGS_SIZE_VER1,
    CloneFlag,
    clone_args,
    pack_clone_args,
    pack_set_tid,
)
from ckpt.kernel.libc import readable_address, syscall


def test_each_argument_has_its_place():
    packed = pack_clone_args(
        flags=CloneFlag.INTO_CGROUP | CloneFlag.VM,
        pidfd=2,
        child_tid=3,
        parent_tid=4,
        exit_signal=5,
        stack=6,
        stack_size=7,
        tls=2**64 - 1,
        set_tid=9,
        n_set_tid=10,
    )
    assert len(packed) == CLONE_ARGS_SIZE_VER1
    args = clone_args.from_buffer_copy(packed + bytes(8))
    values = {name: getattr(args, name) for name, *_ in clone_args._fields_}
    assert values == {
        "flags": 0x200000100,
        "pidfd": 2,
        "child_tid": 3,
        "parent_tid": 4,
        "exit_signal": 5,
        "stack": 6,
        "stack_size": 7,
        "tls": 2**64 - 1,
        "set_tid": 9,
        "set_tid_size": 10,
        "cgroup": 0,
    }


def test_tids_are_four_bytes_each():
    assert pack_set_tid([1, 0x01020304]) == b"\1\0\0\0\4\3\2\1"


def clone3(args):
    """A child that exits with 9 at once; its pid."""
    child = syscall(NR.clone3, readable_address(args)[0], len(args))
    if child == 0:
        os._exit(9)
    return child


def test_the_kernel_takes_it():
    child = clone3(pack_clone_args(exit_signal=signal.SIGCHLD))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_the_kernel_takes_a_chosen_pid(features):
    free = os.fork()
    if free == 0:
        os._exit(0)
    tids = pack_set_tid([free])
    args = pack_clone_args(
        exit_signal=signal.SIGCHLD, set_tid=readable_address(tids)[0], n_set_tid=1
    )
    try:
        # A zombie still holds its number.
        with pytest.raises(OSError, match=r".") as caught:
            clone3(args)
        assert caught.value.errno == (errno.EEXIST if features.set_tid else errno.EPERM)
    finally:
        os.waitpid(free, 0)
    if features.set_tid:
        child = clone3(args)
        assert os.waitpid(child, 0)[0] == free
