"""What an ELF core file is made of: headers, notes, and the structs that the notes hold.

Sources: elf(5), core(5); include/uapi/linux/elf.h (numbers of notes, program headers),
include/uapi/linux/elfcore.h (`elf_prstatus`, `elf_siginfo`), include/linux/elfcore.h
(`elf_prpsinfo`), fs/binfmt_elf.c (`fill_files_note`, and the order of notes), Linux 6.18. The
neighbour `engine/core_file.py` decides what goes in.
"""

import ctypes
import struct
from collections.abc import Sequence

from ckpt.kernel.arch.x86_64 import PAGE_SIZE

ELF_MAGIC = b"\x7fELF"
_ELFCLASS64, _ELFDATA2LSB, _EV_CURRENT = 2, 1, 1
EM_X86_64 = 62
ET_CORE = 4
PT_LOAD, PT_NOTE = 1, 4
PF_X, PF_W, PF_R = 1, 2, 4
PN_XNUM = 0xFFFF
"""As number of program headers: it is too big for 16 bits, section header 0 has it."""

NT_PRSTATUS, NT_PRFPREG, NT_PRPSINFO, NT_AUXV = 1, 2, 3, 6
NT_FILE = 0x46494C45
NT_X86_XSTATE = 0x202

_CORE, _LINUX = b"CORE\0", b"LINUX\0"
_NOTE_NAMES = {NT_X86_XSTATE: _LINUX}
"""All others are of `CORE`."""

FXSAVE_BYTES = 512
"""`struct user_fpregs_struct`, with which each XSAVE area begins."""
N_REGISTERS = 27
NAME_BYTES, PSARGS_BYTES = 16, 80


class Elf64_Ehdr(ctypes.Structure):  # noqa: N801
    """The header of the file."""

    _fields_ = [
        ("e_ident", ctypes.c_ubyte * 16),
        ("e_type", ctypes.c_uint16),
        ("e_machine", ctypes.c_uint16),
        ("e_version", ctypes.c_uint32),
        ("e_entry", ctypes.c_uint64),
        ("e_phoff", ctypes.c_uint64),
        ("e_shoff", ctypes.c_uint64),
        ("e_flags", ctypes.c_uint32),
        ("e_ehsize", ctypes.c_uint16),
        ("e_phentsize", ctypes.c_uint16),
        ("e_phnum", ctypes.c_uint16),
        ("e_shentsize", ctypes.c_uint16),
        ("e_shnum", ctypes.c_uint16),
        ("e_shstrndx", ctypes.c_uint16),
    ]


class Elf64_Phdr(ctypes.Structure):  # noqa: N801
    """Where a part of memory, or the notes, are in the file."""

    _fields_ = [
        ("p_type", ctypes.c_uint32),
        ("p_flags", ctypes.c_uint32),
        ("p_offset", ctypes.c_uint64),
        ("p_vaddr", ctypes.c_uint64),
        ("p_paddr", ctypes.c_uint64),
        ("p_filesz", ctypes.c_uint64),
        ("p_memsz", ctypes.c_uint64),
        ("p_align", ctypes.c_uint64),
    ]


class Elf64_Shdr(ctypes.Structure):  # noqa: N801
    """A section; a core file has one at most, for `PN_XNUM`."""

    _fields_ = [
        ("sh_name", ctypes.c_uint32),
        ("sh_type", ctypes.c_uint32),
        ("sh_flags", ctypes.c_uint64),
        ("sh_addr", ctypes.c_uint64),
        ("sh_offset", ctypes.c_uint64),
        ("sh_size", ctypes.c_uint64),
        ("sh_link", ctypes.c_uint32),
        ("sh_info", ctypes.c_uint32),
        ("sh_addralign", ctypes.c_uint64),
        ("sh_entsize", ctypes.c_uint64),
    ]


class elf_siginfo(ctypes.Structure):  # noqa: N801
    """The signal that ended the process."""

    _fields_ = [
        ("si_signo", ctypes.c_int),
        ("si_code", ctypes.c_int),
        ("si_errno", ctypes.c_int),
    ]


class elf_timeval(ctypes.Structure):  # noqa: N801
    """A time."""

    _fields_ = [("tv_sec", ctypes.c_long), ("tv_usec", ctypes.c_long)]


class elf_prstatus(ctypes.Structure):  # noqa: N801
    """NT_PRSTATUS: a thread, with its general registers."""

    _fields_ = [
        ("pr_info", elf_siginfo),
        ("pr_cursig", ctypes.c_short),
        ("pr_sigpend", ctypes.c_ulong),
        ("pr_sighold", ctypes.c_ulong),
        ("pr_pid", ctypes.c_int),
        ("pr_ppid", ctypes.c_int),
        ("pr_pgrp", ctypes.c_int),
        ("pr_sid", ctypes.c_int),
        ("pr_utime", elf_timeval),
        ("pr_stime", elf_timeval),
        ("pr_cutime", elf_timeval),
        ("pr_cstime", elf_timeval),
        ("pr_reg", ctypes.c_uint64 * N_REGISTERS),
        ("pr_fpvalid", ctypes.c_int),
    ]


class elf_prpsinfo(ctypes.Structure):  # noqa: N801
    """NT_PRPSINFO: the process."""

    _fields_ = [
        ("pr_state", ctypes.c_char),
        ("pr_sname", ctypes.c_char),
        ("pr_zomb", ctypes.c_char),
        ("pr_nice", ctypes.c_char),
        ("pr_flag", ctypes.c_ulong),
        ("pr_uid", ctypes.c_uint),
        ("pr_gid", ctypes.c_uint),
        ("pr_pid", ctypes.c_int),
        ("pr_ppid", ctypes.c_int),
        ("pr_pgrp", ctypes.c_int),
        ("pr_sid", ctypes.c_int),
        ("pr_fname", ctypes.c_char * NAME_BYTES),
        ("pr_psargs", ctypes.c_char * PSARGS_BYTES),
    ]


MappedFile = tuple[int, int, int, bytes]
"""A mapping of a file: start, end, offset in the file in bytes, name."""

_NHDR = struct.Struct("<III")
_ALIGNMENT = 4


def note(kind: int, content: bytes) -> bytes:
    """Return a note (elf(5), Elf64_Nhdr), padded."""
    name = _NOTE_NAMES.get(kind, _CORE)
    return _NHDR.pack(len(name), len(content), kind) + _padded(name) + _padded(content)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % _ALIGNMENT)


def pack_mapped_files(mapped: Sequence[MappedFile]) -> bytes:
    """Return the content of NT_FILE (fs/binfmt_elf.c, fill_files_note)."""
    table = [struct.pack("<QQ", len(mapped), PAGE_SIZE)]
    table += (
        struct.pack("<QQQ", start, end, offset // PAGE_SIZE) for start, end, offset, _ in mapped
    )
    return b"".join(table) + b"".join(name + b"\0" for *_, name in mapped)


def pack_headers(
    notes: tuple[int, int], loads: Sequence[Elf64_Phdr], end: int
) -> tuple[bytes, bytes]:
    """Return what a core file begins with, and what it ends with (mostly nothing).

    Args:
        notes: offset and length of the notes, in bytes.
        loads: headers of the parts of memory, ascending.
        end: the offset behind all memory.
    """
    n_headers = len(loads) + 1
    many = n_headers >= PN_XNUM
    header = Elf64_Ehdr(
        e_type=ET_CORE,
        e_machine=EM_X86_64,
        e_version=_EV_CURRENT,
        e_phoff=ctypes.sizeof(Elf64_Ehdr),
        e_ehsize=ctypes.sizeof(Elf64_Ehdr),
        e_phentsize=ctypes.sizeof(Elf64_Phdr),
        e_phnum=PN_XNUM if many else n_headers,
    )
    header.e_ident[:7] = [*ELF_MAGIC, _ELFCLASS64, _ELFDATA2LSB, _EV_CURRENT]
    tail = b""
    if many:
        header.e_shoff = end
        header.e_shentsize = ctypes.sizeof(Elf64_Shdr)
        header.e_shnum = 1
        tail = bytes(Elf64_Shdr(sh_size=1, sh_info=n_headers))
    at, len_bytes = notes
    of_notes = Elf64_Phdr(p_type=PT_NOTE, p_offset=at, p_filesz=len_bytes, p_align=_ALIGNMENT)
    return b"".join(map(bytes, (header, of_notes, *loads))), tail


def headers_size(n_loads: int) -> int:
    """Return how long the headers of a core file with so many parts of memory are, in bytes."""
    return ctypes.sizeof(Elf64_Ehdr) + (n_loads + 1) * ctypes.sizeof(Elf64_Phdr)
