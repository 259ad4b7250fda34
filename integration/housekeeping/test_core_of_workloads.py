"""The promise: the memory in a core file is the memory of the process, whatever it is made of."""

import os

import pytest
from elftools.elf.elffile import ELFFile

from ckpt.engine.examining import examine
from ckpt.image.chain import Chain
from ckpt.image.runs import Fate
from integration.harness import dump
from integration.housekeeping.processes import told
from integration.workloads.driver import Program

CHUNK = 1 << 20


def iter_data(core):
    """Yield the address and the content of what is in a core file, without its holes."""
    with core.open("rb") as file:
        for segment in ELFFile(file).iter_segments("PT_LOAD"):
            at, end = segment["p_offset"], segment["p_offset"] + segment["p_filesz"]
            while at < end and (at := data_from(file.fileno(), at)) < end:
                hole = min(os.lseek(file.fileno(), at, os.SEEK_HOLE), end)
                for start in range(at, hole, CHUNK):
                    address = segment["p_vaddr"] + start - segment["p_offset"]
                    yield address, os.pread(file.fileno(), min(CHUNK, hole - start), start)
                at = hole


def data_from(fd, at):
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError:
        return 1 << 63


def without(content, at, changing):
    """Put zeros where the kernel writes whenever a thread goes on (rseq(2))."""
    page = bytearray(content)
    for start, len_bytes in changing:
        for byte in range(max(start - at, 0), min(start + len_bytes - at, len(page))):
            page[byte] = 0
    return bytes(page)


def differing_chunks(core, memory, changing):
    for at, held in iter_data(core):
        real = os.pread(memory, len(held), at)
        if without(held, at, changing) != without(real, at, changing):
            yield at


def stored_bytes(image):
    """Return how much of private memory the image has; what is shared may be of several files."""
    examined = examine(Chain.open(image), None)
    space = examined.reader.resolve(examined.tree.root.space)
    return space.totals()[Fate.DATA] * space.page_size


@pytest.mark.parametrize("name", ["s_memory", "s_shared", "s_memfd", "s_sysv", "s_threads"])
def test_memory_is_that_of_the_process(name, tmp_path):
    image, core = tmp_path / "image", tmp_path / "core"
    with Program(name, cwd=tmp_path) as work:
        dump(work.pid, image)
        code, _, err = told("export", image, "-o", core)
        assert (code, err) == (0, "")
        root = examine(Chain.open(image), None).tree.root
        threads = [one.resources["thread"] for one in root.threads]
        changing = [(one.rseq_at, one.rseq_bytes) for one in threads]
        memory = os.open(f"/proc/{work.pid}/mem", os.O_RDONLY)
        try:
            assert list(map(hex, differing_chunks(core, memory, changing))) == []
        finally:
            os.close(memory)
    held = sum(len(content) for _, content in iter_data(core))
    assert held >= stored_bytes(image)
    mapped = {vma.start for vma in root.resources["memory"].vmas}
    mapped |= {one.start for one in root.resources["sysv"].attached}
    with core.open("rb") as file:
        starts = {segment["p_vaddr"] for segment in ELFFile(file).iter_segments("PT_LOAD")}
    assert starts >= mapped
