"""What a mapping has is restored, without meaning, or refused by name, never lost."""

import os

import attrs
import pytest

from ckpt.kernel.procfs.maps import Vma, read_smaps
from ckpt.resources.mappings import KERNEL_VMAS, problem_of
from ckpt.units import Pid, addr_range

ME = Pid(os.getpid())
PLAIN = Vma(
    span=addr_range(0x10000, 0x1000),
    readable=True,
    writable=True,
    executable=False,
    shared=False,
    offset_bytes=0,
    dev=(0, 0),
    inode=0,
    path=None,
    deleted=False,
    flags=frozenset(("rd", "wr", "mr", "mw", "me", "ac")),
)


def problem(*flags, **fields):
    return problem_of(ME, attrs.evolve(PLAIN, flags=PLAIN.flags | set(flags), **fields))


@pytest.mark.parametrize(
    "flag",
    [
        "gd",
        "lo",
        "lf",
        "sr",
        "rr",
        "dc",
        "de",
        "nr",
        "wf",
        "dd",
        "sd",
        "hg",
        "nh",
        "mg",
        "uw",
        "sl",
        "dp",
        "gu",
    ],
)
def test_what_comes_back_or_has_no_meaning_is_let_through(flag):
    assert problem(flag) == ""


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("ht", "hugetlbfs"),
        ("sf", "MAP_SYNC"),
        ("ss", "shadow stack"),
        ("um", "userfaultfd"),
        ("ui", "userfaultfd"),
        ("io", "device"),
        ("pf", "device"),
        ("mm", "device"),
        ("mt", "tags"),
        ("??", "VmFlags ??"),
        ("zz", "VmFlags zz"),
    ],
)
def test_what_would_be_lost_is_named(flag, word):
    assert word in problem(flag)


def test_a_protection_key_is_named():
    assert "protection key (5)" in problem(protection_key=5)


@pytest.mark.parametrize("path", KERNEL_VMAS)
def test_what_the_kernel_maps_is_let_through(path):
    assert problem("io", "pf", path=path) == ""


def test_this_very_process_has_nothing_unknown():
    found = [problem_of(ME, vma) for vma in read_smaps(ME) if vma.path != "[vsyscall]"]
    assert not [one for one in found if "VmFlags" in one]
