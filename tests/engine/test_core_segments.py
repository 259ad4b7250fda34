"""The promise: a core file holds what the image does, and says nothing of what it does not."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.core_segments import (
    Places,
    held_bytes,
    iter_private_parts,
    plan_segments,
)
from ckpt.image.runs import Fate, ResolvedRuns
from ckpt.kernel.elf_core import PF_R, PF_W, PF_X

PAGE = 4096
RW = 3
LETTERS = {"D": Fate.DATA, "Z": Fate.ZERO, "F": Fate.FILE}


@attrs.frozen
class Vma:
    start: int
    end: int
    prot: int = RW


def runs_of(fates, first=0):
    runs = ResolvedRuns.empty(PAGE)
    for index, letter in enumerate(fates):
        runs.append((first + index) * PAGE, 1, LETTERS[letter], 0, first + index)
    return runs


def shown(fates, *, here=False, header=False, prot=RW):
    """What is held of a mapping, page by page."""
    vma = Vma(0, len(fates) * PAGE, prot)
    parts = iter_private_parts(vma, runs_of(fates), file_is_here=here, has_elf_header=header)
    return "".join(("#" if held else ".") * ((end - start) // PAGE) for start, end, held in parts)


@pytest.mark.parametrize(
    ("fates", "options", "held"),
    [
        ("DDZZD", {}, "#####"),
        ("ZZZZ", {}, "####"),
        ("ZZZZ", {"prot": 0}, "...."),
        ("ZDZ", {"prot": 0}, ".#."),
        ("FFFF", {}, "...."),
        ("FFFF", {"here": True}, "...."),
        ("FFFF", {"here": True, "header": True}, "#..."),
        ("FDFF", {"here": True}, "####"),
        ("FDFF", {}, ".#.."),
    ],
)
def test_what_is_held_of_a_private_mapping(fates, options, held):
    assert shown(fates, **options) == held


def test_address_space_that_is_only_reserved_is_not_held():
    wide = (64 << 30) // PAGE
    runs = ResolvedRuns.empty(PAGE)
    runs.append(0, 1, Fate.DATA, 0, 0)
    runs.append(PAGE, wide, Fate.ZERO, 0, 0)
    vma = Vma(0, (1 + wide) * PAGE)
    parts = list(iter_private_parts(vma, runs, file_is_here=False, has_elf_header=False))
    assert held_bytes(plan_segments([(vma, parts)])) == PAGE


def test_protections_become_flags():
    vmas = [Vma(i * PAGE, (i + 1) * PAGE, prot) for i, prot in enumerate((0, 1, 3, 5, 7))]
    segments = plan_segments((vma, [(vma.start, vma.end, True)]) for vma in vmas)
    flags = [segment.flags for segment in segments]
    assert flags == [0, PF_R, PF_R | PF_W, PF_R | PF_X, PF_R | PF_W | PF_X]


@st.composite
def layouts(draw):
    """Mappings, each a list of whether its pages are held, with holes between some."""
    at, mapped = 0, []
    for held in draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), max_size=6)):
        at += draw(st.integers(0, 2))
        pages = [((at + i) * PAGE, (at + i + 1) * PAGE, one) for i, one in enumerate(held)]
        mapped.append((Vma(at * PAGE, (at + len(held)) * PAGE), pages))
        at += len(held)
    return mapped


@given(layouts())
def test_every_held_page_has_one_place_and_no_other_has_one(mapped):
    segments = plan_segments(mapped)
    places = Places(segments)
    pages = [page for _, parts in mapped for page in parts]
    offsets = []
    for start, _, held in pages:
        found = list(places.iter_parts(start, PAGE))
        assert len(found) == held
        for offset, skipped, len_bytes in found:
            assert (skipped, len_bytes) == (0, PAGE)
            offsets.append(offset)
    assert offsets == [index * PAGE for index in range(len(offsets))]
    assert held_bytes(segments) == len(offsets) * PAGE
    # The segments cover each mapping whole, none reaches over the end of one.
    covered = [page for one in segments for page in range(one.start, one.end, PAGE)]
    assert covered == [start for start, _, _ in pages]
    assert {one.start for one in segments} >= {vma.start for vma, _ in mapped}


def test_what_spans_several_mappings_is_cut_where_they_end():
    mapped = [
        (Vma(0, 2 * PAGE), [(0, PAGE, True), (PAGE, 2 * PAGE, False)]),
        (Vma(2 * PAGE, 3 * PAGE), [(2 * PAGE, 3 * PAGE, True)]),
    ]
    parts = list(Places(plan_segments(mapped)).iter_parts(100, 3 * PAGE - 200))
    assert parts == [(100, 0, PAGE - 100), (PAGE, 2 * PAGE - 100, PAGE - 100)]
