"""The promise: what others read of our core files' headers and notes is what was put in."""

import io

from elftools.elf.elffile import ELFFile

from ckpt.kernel import elf_core
from ckpt.kernel.elf_core import PF_R, PT_LOAD, Elf64_Phdr, headers_size, note, pack_headers

FILES = [(0x1000, 0x3000, 0x2000, b"/lib/a"), (0x8000, 0x9000, 0, "/tmp/é".encode())]


def loads(n):
    return [Elf64_Phdr(p_type=PT_LOAD, p_flags=PF_R, p_vaddr=i << 12) for i in range(n)]


def read(content):
    return ELFFile(io.BytesIO(content))


def test_notes_have_their_owner_and_their_content():
    notes = note(elf_core.NT_AUXV, b"12345") + note(elf_core.NT_X86_XSTATE, b"x" * 8)
    at = headers_size(1)
    head, tail = pack_headers((at, len(notes)), loads(1), 0)
    assert (len(head), tail) == (at, b"")
    elf = read(head + notes)
    assert elf.header.e_type == "ET_CORE"
    assert elf.header.e_machine == "EM_X86_64"
    found = [(one.n_name, one.n_descsz) for one in elf.get_segment(0).iter_notes()]
    assert found == [("CORE", 5), ("LINUX", 8)]


def test_mapped_files_are_told_with_offsets_in_pages():
    content = note(elf_core.NT_FILE, elf_core.pack_mapped_files(FILES))
    head, _ = pack_headers((headers_size(0), len(content)), [], 0)
    (found,) = read(head + content).get_segment(0).iter_notes()
    told = found.n_desc
    assert told.page_size == 4096
    rows = [(row.vm_start, row.vm_end, row.page_offset) for row in told.Elf_Nt_File_Entry]
    assert rows == [(0x1000, 0x3000, 2), (0x8000, 0x9000, 0)]
    assert list(told.filename) == [b"/lib/a", "/tmp/é".encode()]


def test_more_parts_of_memory_than_sixteen_bits_can_count():
    n = 0x10000
    at = headers_size(n)
    head, tail = pack_headers((at, 0), loads(n), at)
    elf = read(head + tail)
    assert elf.header.e_phnum == elf_core.PN_XNUM
    assert elf.num_segments() == n + 1
    assert elf.get_segment(n).header.p_vaddr == (n - 1) << 12
