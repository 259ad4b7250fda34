"""The promise: our programs are ELF files as the specification has them, and load where we say."""

import io
import os
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from ckpt.kernel.arch import x86_64 as arch
from ckpt.process.programs import CODE_AT, LOAD_AT, elf

CODE = b"\x90" * 37 + arch.SYSCALL_INSN


@pytest.fixture
def parsed():
    return ELFFile(io.BytesIO(elf(CODE)))


def test_the_header(parsed):
    header = parsed.header
    assert (header["e_type"], header["e_machine"]) == ("ET_EXEC", "EM_X86_64")
    assert header["e_ident"]["EI_CLASS"] == "ELFCLASS64"
    assert header["e_ident"]["EI_DATA"] == "ELFDATA2LSB"
    assert header["e_entry"] == CODE_AT
    assert (header["e_phnum"], header["e_shnum"]) == (1, 0)
    assert header["e_ehsize"] == 64


def test_the_one_segment_holds_the_code_at_its_address(parsed):
    (segment,) = parsed.iter_segments()
    header = segment.header
    assert (header["p_type"], header["p_flags"]) == ("PT_LOAD", 0x5), "readable and executable"
    assert (header["p_offset"], header["p_vaddr"]) == (0, LOAD_AT)
    assert header["p_filesz"] == header["p_memsz"] == len(elf(CODE))
    at = CODE_AT - header["p_vaddr"]
    assert segment.data()[at:] == CODE


def test_no_stack_is_executable(parsed):
    # Without PT_GNU_STACK the kernel makes none executable either on x86-64 (since 5.8), and our
    # programs have nothing there: their restored selves get the image's stack.
    assert [segment["p_type"] for segment in parsed.iter_segments()] == ["PT_LOAD"]


def test_it_lies_where_any_process_may_map():
    lowest = int(Path("/proc/sys/vm/mmap_min_addr").read_text())
    assert lowest <= LOAD_AT
    assert LOAD_AT % os.sysconf("SC_PAGESIZE") == 0


@pytest.mark.parametrize("code", [arch.PAUSE_CODE, arch.POLL_CODE])
def test_our_programs_fit_into_the_first_page(code):
    assert len(elf(code)) < arch.PAGE_SIZE
