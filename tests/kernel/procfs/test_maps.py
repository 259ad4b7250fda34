import mmap
import os

import attrs
import hypothesis.strategies as st
import pytest
from hypothesis import given

from ckpt.errors import TargetGone
from ckpt.kernel.libc import writable_address
from ckpt.kernel.procfs.maps import (
    Vma,
    parse_maps,
    parse_smaps,
    read_lines,
    read_maps,
    read_smaps,
    read_smaps_by_line,
)
from ckpt.units import AddrRange, Pid
from tests.kernel.children import ended, running
from tests.kernel.procfs.captured import text

MAPS = parse_maps(text("maps"))
SMAPS = parse_smaps(text("smaps"))


def only(vmas, path):
    (vma,) = [vma for vma in vmas if vma.path == path]
    return vma


def test_every_line_is_one_mapping():
    assert len(MAPS) == text("maps").count("\n")
    assert [vma.span for vma in MAPS] == sorted(vma.span for vma in MAPS)


def test_a_file_mapping():
    assert MAPS[1] == Vma(
        span=AddrRange(0x41F000, 0x6D2000),
        readable=True,
        writable=False,
        executable=True,
        shared=False,
        offset_bytes=0x1F000,
        dev=(0xFE, 0),
        inode=260811,
        path="/usr/bin/python3.11",
        deleted=False,
    )
    assert MAPS[1].perms == "r-xp"
    assert MAPS[1].is_file


def test_anonymous_memory_has_no_path():
    vma = MAPS[5]
    assert (vma.path, vma.inode, vma.dev, vma.is_file) == (None, 0, (0, 0), False)


@pytest.mark.parametrize(
    ("path", "deleted", "is_file"),
    [
        ("[heap]", False, False),
        ("[stack]", False, False),
        ("[vvar]", False, False),
        ("[vvar_vclock]", False, False),
        ("[vdso]", False, False),
        ("[vsyscall]", False, False),
        ("[uprobes]", False, False),
        ("[anon:a name: (x)]", False, False),
        ("anon_inode:[io_uring]", False, True),
        ("/[aio]", True, True),
        ("/SYSV00000000", True, True),
        ("/dev/zero", True, True),
        ("/memfd:a name", True, True),
        ("/anon_hugepage", True, True),
        ("(unreachable)/outside", False, True),
        ("/tmp/a dir/gone", True, True),
        ("/tmp/a dir/with  two spaces ", False, True),
        ("/tmp/a dir/new\nline", False, True),
        ("/tmp/a dir/new\nline gone (deleted)", True, True),
        ("/tmp/a dir/latin-\udce9", False, True),
        ("/tmp/a dir/u2028-\u2028-x85-\x85", False, True),
    ],
)
def test_names(path, deleted, is_file):
    vma = only(MAPS, path)
    assert (vma.deleted, vma.is_file) == (deleted, is_file)


def test_a_name_survives_the_way_back_to_bytes():
    assert os.fsencode(only(MAPS, "/tmp/a dir/latin-\udce9").path) == b"/tmp/a dir/latin-\xe9"


def test_numbers_of_any_size():
    vma = only(MAPS, "(unreachable)/outside")
    assert (vma.dev, vma.inode, vma.shared) == ((0x1F3, 0xFFFFF), 2**64 - 1, True)
    assert only(MAPS, "[vsyscall]").span == AddrRange(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000)
    assert only(MAPS, "/tmp/a dir/gone").offset_bytes == 0x1000


def test_names_given_by_prctl():
    assert only(MAPS, "[anon:a name: (x)]").anon_name == "a name: (x)"
    assert only(MAPS, "[anon_shmem:shared heap]").anon_name == "shared heap"
    assert only(MAPS, "[heap]").anon_name is None
    assert MAPS[5].anon_name is None


@pytest.mark.parametrize("line", ["x", "1000-2000 rw-p 0 0:0", "1000-2000 rw 0 0:0 0", "a-b c"])
def test_another_form_is_refused(line):
    with pytest.raises(ValueError, match="not a line"):
        parse_maps(line + "\n")


def test_smaps_are_maps_with_flags():
    assert len(SMAPS) == text("smaps").count("VmFlags:")
    assert only(SMAPS, "[stack]").flags == {"rd", "wr", "mr", "mw", "me", "gd", "ac"}
    assert only(SMAPS, "[vsyscall]").flags == {"ex"}
    assert only(SMAPS, "/tmp/a dir/new\nline").flags == {"rd", "mr", "mw", "me"}
    assert {code for vma in SMAPS for code in vma.flags} >= {"lo", "nr", "dc", "dd", "sh", "mm"}


def test_smaps_without_flags_have_none():
    kept = [line for line in text("smaps").split("\n") if not line.startswith("VmFlags")]
    assert {vma.flags for vma in parse_smaps("\n".join(kept))} == {frozenset()}


HEX = st.integers(0, 2**64 - 1)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=()), min_size=1).filter(
    lambda name: not name.endswith(" (deleted)") and "\\012" not in name
)


@given(
    start=HEX,
    end=HEX,
    perms=st.tuples(*(st.sampled_from(pair) for pair in ("r-", "w-", "x-", "sp"))),
    offset=HEX,
    inode=HEX,
    name=NAMES,
    deleted=st.booleans(),
)
def test_what_the_kernel_prints_is_read_back(start, end, perms, offset, inode, name, deleted):
    escaped = "/" + name.replace("\n", "\\012") + " (deleted)" * deleted
    head = f"{start:08x}-{end:08x} {''.join(perms)} {offset:08x} 1f:0a {inode}".ljust(73)
    (vma,) = parse_maps(f"{head}{escaped}\n" if head[-1] == " " else f"{head} {escaped}\n")
    assert (vma.span.start, vma.span.end, vma.perms) == (start, end, "".join(perms))
    assert (vma.offset_bytes, vma.dev, vma.inode) == (offset, (0x1F, 0x0A), inode)
    assert (vma.path, vma.deleted) == ("/" + name, deleted)


def test_our_own_mapping_is_there():
    with mmap.mmap(-1, 3 * mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as memory:
        address, _ = writable_address(memory)
        (vma,) = [vma for vma in read_maps(os.getpid()) if address in vma.span]
        assert (vma.perms, vma.path, vma.deleted) == ("rw-s", "/dev/zero", True)


def test_flags_of_a_live_process():
    code = """
        memory = private_memory(4)
        memory.madvise(10)  # MADV_DONTFORK
        say(address_of(memory))
        wait()
    """
    with running(code) as child:
        (start,) = child.heard()
        (vma,) = [vma for vma in read_smaps(child.pid) if start in vma.span]
        assert {"rd", "wr", "dc", "nh"} <= vma.flags
        assert "sh" not in vma.flags


def test_kernel_threads_and_zombies_have_no_mappings():
    assert read_maps(2) == []
    with ended() as pid:
        assert read_maps(pid) == read_smaps(pid) == []


def test_gone():
    with pytest.raises(TargetGone):
        read_maps(0x7FFFFFFF)


def test_the_protection_key_belongs_to_the_mapping_above_it():
    header = "7f0000000000-7f0000001000 rw-p 00000000 00:00 0"
    other = header.replace("7f00", "7f11")
    text = f"{header}\nProtectionKey:         3\nVmFlags: rd wr\n{other}\nVmFlags: rd\n"
    assert [vma.protection_key for vma in parse_smaps(text)] == [3, 0]


def test_each_mapping_of_smaps_has_its_line_in_maps():
    pid = Pid(os.getpid())
    mmap_of_ours = mmap.mmap(-1, 3 * mmap.PAGESIZE)  # so that there is one to be told apart
    by_line = read_smaps_by_line(pid)
    assert set(by_line) & set(read_lines(pid)) > {
        line for line, vma in by_line.items() if vma.path == "[vdso]"
    }
    assert parse_maps("\n".join(by_line)) == [
        attrs.evolve(vma, flags=frozenset(), protection_key=0) for vma in by_line.values()
    ]
    mmap_of_ours.close()


def test_what_is_read_again_is_what_is_there():
    pid = Pid(os.getpid())
    before = read_maps(pid)
    ours = mmap.mmap(-1, 64 * mmap.PAGESIZE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    with_ours = read_maps(pid)
    new = [vma for vma in with_ours if vma not in before]
    assert any(vma.span.len_bytes == 64 * mmap.PAGESIZE for vma in new)
    ours.close()
    assert not any(vma.span == new[0].span and vma.shared for vma in read_maps(pid))
