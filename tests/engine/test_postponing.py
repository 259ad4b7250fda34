"""What of a tree may come when it runs already: chosen by its source, checked by who takes it."""

import mmap

import pytest

from ckpt.engine.postponing import postpone, split_mappings
from ckpt.resources.memory import VmaRecord
from ckpt.units import addr_range

PAGE = mmap.PAGESIZE
WIDE = 64


def vma(start, n_pages=WIDE, *, shared=False, file=-1, flags=(), special=""):
    return VmaRecord(start, start + n_pages * PAGE, 3, shared, special, file, 0, flags, "")


def pages(start, first, n):
    return (start + first * PAGE, start + (first + n) * PAGE)


def test_a_mapping_with_many_pages_is_left_and_one_with_few_is_not():
    many, few = (0x100000, 0x200000), (0x200000, 0x900000)
    populated = [pages(0x100000, 0, 8), pages(0x100000, 100, 8), pages(0x200000, 7, 15)]
    assert postpone([many, few], populated) == [many]


def test_pages_that_reach_over_two_mappings_count_in_each():
    left, right = (0x100000, 0x120000), (0x120000, 0x140000)
    assert postpone([left, right], [(0x110000, 0x130000)]) == [left, right]
    assert postpone([left, right], [(0x110000, 0x12F000)]) == [left]


def test_a_tree_without_pages_leaves_nothing():
    assert postpone([(0x100000, 0x200000)], []) == []
    assert postpone([], [(0x100000, 0x200000)]) == []


def test_only_mappings_with_missing_pages_are_watched():
    one, other, last = vma(0x100000), vma(0x140000), vma(0x900000)
    missing = [pages(0x140000, 3, 2), pages(0x900000, 0, WIDE)]
    lazy, others = split_mappings([one, other, last], missing)
    assert lazy == [other.span, last.span]
    assert others == [one.span]


def test_without_missing_pages_all_is_there_at_once():
    assert split_mappings([vma(0x100000)], []) == ([], [addr_range(0x100000, WIDE * PAGE)])


@pytest.mark.parametrize(
    "mapped",
    [{"shared": True}, {"file": 0}, {"flags": ("lo",)}, {"flags": ("wf",)}, {"n_pages": 8}],
)
def test_pages_that_cannot_come_later_are_not_believed_to(mapped):
    with pytest.raises(ValueError, match="at once"):
        split_mappings([vma(0x100000, **mapped)], [pages(0x100000, 4, 8)])
