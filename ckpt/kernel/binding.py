"""python-ptrace's raw binding, imported without its search for the C library.

On import `ptrace.binding` has `ctypes.util.find_library` look for libc, which runs ldconfig in a
child process and loads subprocess, tempfile and what those need: half of what python-ptrace costs
at the start of every command. This process has its libc open, so the module that would search is
there already when python-ptrace asks for it.
"""

import ctypes
import sys
import types


class _OpenLibc(types.ModuleType):
    """Stands for `ptrace.ctypes_libc`, with its two names."""

    LIBC_FILENAME = None
    libc = ctypes.CDLL(None, use_errno=True)


sys.modules.setdefault("ptrace.ctypes_libc", _OpenLibc("ptrace.ctypes_libc"))

from ptrace import PtraceError  # noqa: E402
from ptrace.binding.func import ptrace  # noqa: E402
from ptrace.binding.linux_struct import iovec_struct, user_regs_struct  # noqa: E402

__all__ = ["PtraceError", "iovec_struct", "ptrace", "user_regs_struct"]
