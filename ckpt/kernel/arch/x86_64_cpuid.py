"""What the processor says of itself: the cpuid instruction, run in our own process.

Python has no instruction for it, so a few bytes of code are put on a page of ours.

Source: Intel SDM volume 2, CPUID; leaf 0xD is the layout of XSAVE.
"""

import ctypes
import mmap
import struct

from ckpt.kernel.arch.x86_64_syscalls import NR
from ckpt.kernel.libc import syscall, writable_address

_CODE = bytes.fromhex(
    "53"  # push %rbx, which cpuid overwrites and the caller wants back
    "89f8"  # mov %edi, %eax: the leaf
    "89f1"  # mov %esi, %ecx: the subleaf
    "4989d0"  # mov %rdx, %r8: where the answer goes
    "0fa2"  # cpuid
    "418900"  # mov %eax, (%r8)
    "41895804"  # mov %ebx, 4(%r8)
    "41894808"  # mov %ecx, 8(%r8)
    "4189500c"  # mov %edx, 12(%r8)
    "5b"  # pop %rbx
    "c3"  # ret
)
_ANSWER = struct.Struct("=IIII")

_XSAVE_LEAF = 0xD


def cpuid(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """Return (eax, ebx, ecx, edx) of a leaf, as the processor that we run on answers.

    Raises:
        OSError: EACCES, this system forbids code on pages that were written.
    """
    answer = bytearray(_ANSWER.size)
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page.write(_CODE)
        address, size = writable_address(page)
        syscall(NR.mprotect, address, size, mmap.PROT_READ | mmap.PROT_EXEC)
        call = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)
        call(address)(leaf, subleaf, writable_address(answer)[0])
    eax, ebx, ecx, edx = _ANSWER.unpack(answer)
    return eax, ebx, ecx, edx


def xsave_bytes() -> int:
    """Return the size of the XSAVE area with all features that the kernel has switched on.

    It is what PTRACE_GETREGSET of NT_X86_XSTATE fills at most; 0 without XSAVE.

    Raises:
        OSError: EACCES, this system forbids code on pages that were written.
    """
    highest, _, _, _ = cpuid(0)
    if highest < _XSAVE_LEAF:
        return 0
    _, enabled, _, _ = cpuid(_XSAVE_LEAF)
    return enabled


def xsave_components() -> int:
    """Return the components of XSTATE that the processor offers, one bit each as in XCR0.

    0 without XSAVE.

    Raises:
        OSError: EACCES, this system forbids code on pages that were written.
    """
    highest, _, _, _ = cpuid(0)
    if highest < _XSAVE_LEAF:
        return 0
    low, _, _, high = cpuid(_XSAVE_LEAF)
    return high << 32 | low
