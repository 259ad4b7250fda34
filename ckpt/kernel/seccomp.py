"""seccomp(2): its constants, and the programs of filters as data.

Source: seccomp(2), include/uapi/linux/{seccomp,filter,bpf_common}.h (Linux 6.18).
"""

import enum
import re
import struct
from collections.abc import Iterator

import attrs

SECCOMP_SET_MODE_STRICT = 0
SECCOMP_SET_MODE_FILTER = 1

SECCOMP_RET_USER_NOTIF = 0x7FC0_0000
SECCOMP_RET_ACTION_FULL = 0xFFFF_0000

BPF_MAXINSNS = 4096
SOCK_FILTER_BYTES = 8
_SOCK_FILTER = struct.Struct("<HBBI")
_SOCK_FPROG = struct.Struct("<H6xQ")
FPROG_POINTER_OFFSET = 8
"""Where `struct sock_fprog` points to its instructions."""

_BPF_CLASS = 0x07
_BPF_LD, _BPF_ALU, _BPF_RET = 0x00, 0x04, 0x06
_BPF_RVAL, _BPF_A = 0x18, 0x10
_BPF_IMM = 0x00
_BPF_MODE = 0xE0


class Mode(enum.IntEnum):
    """SECCOMP_MODE_*, as /proc/PID/status shows it."""

    DISABLED = 0
    STRICT = 1
    FILTER = 2


class FilterFlag(enum.IntFlag):
    """SECCOMP_FILTER_FLAG_*."""

    NONE = 0
    TSYNC = 1
    LOG = 2
    SPEC_ALLOW = 4


@attrs.frozen(slots=True, repr=False)
class Instruction:
    """One `struct sock_filter`."""

    code: int
    jt: int
    jf: int
    k: int


def iter_instructions(program: bytes) -> Iterator[Instruction]:
    """Yield the instructions of a program.

    Raises:
        ValueError: its length is no multiple of an instruction's.
    """
    if len(program) % SOCK_FILTER_BYTES:
        raise ValueError(f"{len(program)} bytes are no filter program")
    for code, jt, jf, k in _SOCK_FILTER.iter_unpack(program):
        yield Instruction(code, jt, jf, k)


def pack_fprog(program: bytes) -> bytes:
    """Return a `struct sock_fprog` whose pointer is still to be filled in."""
    return _SOCK_FPROG.pack(len(program) // SOCK_FILTER_BYTES, 0)


def may_notify(program: bytes) -> bool:
    """Tell whether a filter may hand calls to a process that listens (SECCOMP_RET_USER_NOTIF).

    Pure: a program that returns what it has computed may, if it loads such a value anywhere.
    """
    returned: set[int] = set()
    loaded: set[int] = set()
    computes = False
    for insn in iter_instructions(program):
        kind = insn.code & _BPF_CLASS
        if kind == _BPF_RET:
            if insn.code & _BPF_RVAL == _BPF_A:
                computes = True
            else:
                returned.add(insn.k & SECCOMP_RET_ACTION_FULL)
        elif kind == _BPF_ALU or (kind == _BPF_LD and insn.code & _BPF_MODE == _BPF_IMM):
            loaded.add(insn.k & SECCOMP_RET_ACTION_FULL)
    return SECCOMP_RET_USER_NOTIF in returned or (computes and SECCOMP_RET_USER_NOTIF in loaded)


_STATUS_MODE = re.compile(rb"\nSeccomp:\t(\d+)\n(?:Seccomp_filters:\t(\d+)\n)?")


def parse_mode(status_text: bytes) -> tuple[int, int]:
    """Take mode and number of filters, and nothing else, out of /proc/PID/status.

    Returns:
        Mode; number of filters, 0 where the kernel does not tell (before 5.9). (0, 0) from a kernel
        without seccomp.
    """
    found = _STATUS_MODE.search(status_text)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)
