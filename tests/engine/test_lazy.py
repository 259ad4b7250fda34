"""What is left for later: wide private anonymous memory, and nothing that must be there at once."""

import mmap

import pytest

from ckpt.engine.lazy import plan_lazy
from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.resources.memory import VmaRecord
from ckpt.units import addr_range

PAGE = mmap.PAGESIZE
WIDE = 64


def vma(start, n_pages=WIDE, *, shared=False, file=-1, flags=(), special=""):
    return VmaRecord(start, start + n_pages * PAGE, 3, shared, special, file, 0, flags, "")


def plan(vmas, n_stored=WIDE):
    runs = ResolvedRuns.empty(PAGE)
    for one in vmas:
        runs.append(one.start, n_stored, Fate.DATA, 0, 0)
    return plan_lazy(vmas, runs)


def test_wide_anonymous_memory_is_left_for_later():
    one, other = vma(0x100000), vma(0x900000)
    assert plan([one, other]) == ([one.span, other.span], [])


@pytest.mark.parametrize(
    "kept",
    [
        {"shared": True},
        {"file": 0},
        {"flags": ("lo", "rd", "wr")},
        {"flags": ("rd", "wf", "wr")},
        {"flags": ("dp", "rd", "wr")},
    ],
)
def test_what_must_be_there_at_once_is_not(kept):
    one, other = vma(0x100000), vma(0x900000, **kept)
    assert plan([one, other]) == ([one.span], [other.span])


def test_little_is_not_worth_it_however_wide_its_mapping():
    assert plan([vma(0x100000, 10 * WIDE)], n_stored=2) == (
        [],
        [addr_range(0x100000, 10 * WIDE * PAGE)],
    )


def test_neighbours_that_are_filled_at_once_are_one_range():
    vmas = [vma(0x100000, 1), vma(0x100000 + PAGE, 1)]
    assert plan(vmas, n_stored=1) == ([], [addr_range(0x100000, 2 * PAGE)])
