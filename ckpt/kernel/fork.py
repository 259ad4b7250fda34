"""A fork that shares our descriptors: what one of the two opens, the other has too.

`os.fork` copies the table of descriptors. With CLONE_FILES both have the same, so that whatever one
holds stays open for as long as the other lives.

Source: clone(2).
"""

import ctypes
import os
import signal
from typing import Final

from ckpt.kernel.arch import NR
from ckpt.units import Pid

CLONE_FILES: Final = 0x400

# A PyDLL keeps the interpreter lock, so that the child has it too.
_raw_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_raw_syscall.restype = ctypes.c_long
_raw_syscall.argtypes = [ctypes.c_long] * 6


def fork_sharing_descriptors() -> Pid:
    """Fork; return the child's pid in the parent and 0 in the child.

    State: no other thread of ours runs (nobody would be there to give back its locks).

    Raises:
        OSError: the kernel refused it.
    """
    ctypes.pythonapi.PyOS_BeforeFork()
    made: int = _raw_syscall(NR.clone, CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)
    number = ctypes.get_errno()
    if made == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return Pid(0)
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if made < 0:
        raise OSError(number, os.strerror(number))
    return Pid(made)
