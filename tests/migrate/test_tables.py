"""Where pages are that have arrived: what the source says that counts, in the frames that came."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.stream import Copied, Stream
from ckpt.image.runs import Fate
from ckpt.migrate.messages import PagesOf
from ckpt.migrate.spans import pack_spans
from ckpt.migrate.tables import build_tables, unpack_held
from ckpt.resources.content import ContentKind
from tests.engine.memory_model import PAGE, by_page, memory, spans_of, vma

N_PAGES = 12
numbers = st.sets(st.integers(0, N_PAGES - 1))


def tree(*spaces, contents=()):
    """Return processes of which each has one mapping; the first one's files have content."""
    processes = []
    for space in spaces:
        records = {
            "memory": memory(vma(0, N_PAGES)),
            "contents": SimpleNamespace(contents=() if processes else contents),
        }
        processes.append(SimpleNamespace(has_memory=True, space=space, resources=records))
    return SimpleNamespace(processes=processes)


def content(space, size_bytes, kind=ContentKind.MEMFD):
    return SimpleNamespace(space=space, size_bytes=size_bytes, kind=kind)


@given(st.lists(st.tuples(st.sampled_from("ab"), numbers), max_size=8), numbers, numbers)
def test_what_is_not_in_place_is_where_it_came_last(frames, wanted, there):
    stream = Stream()
    newest = {"a": {}, "b": {}}
    ordinal = 0
    for space, pages in frames:
        stream.append(Copied(space, spans_of(pages)))
        for page in sorted(pages):
            newest[space][page] = ordinal
            ordinal += 1
    counting = {space: wanted & came.keys() for space, came in newest.items()}
    held = {space: spans_of(pages) for space, pages in counting.items()}
    tables = build_tables(tree("a", "b"), held, {"a": spans_of(there)}, stream)
    for space, in_place in (("a", there), ("b", set())):
        found = by_page(tables[space])
        for page in range(N_PAGES):
            if page in counting[space] - in_place:
                assert found[page] == (Fate.DATA, newest[space][page])
            else:
                assert found[page][0] is Fate.ZERO


def test_the_content_of_a_file_ends_where_it_does():
    stream = Stream([Copied("a", []), Copied("file", [(0, 3 * PAGE)])])
    contents = [content("file", PAGE + 1), content("folder", 0, ContentKind.DIRECTORY)]
    held = {"a": [], "file": [(PAGE, 3 * PAGE)]}
    tables = build_tables(tree("a", contents=contents), held, {}, stream)
    assert by_page(tables["file"]) == {0: (Fate.ZERO, None), 1: (Fate.DATA, 1)}
    assert "folder" not in tables


def test_pages_that_did_not_come_are_told():
    stream = Stream([Copied("a", [(0, 2 * PAGE)])])
    with pytest.raises(ValueError, match=r"pages of 'a' did not come, at 0x2000"):
        build_tables(tree("a"), {"a": [(PAGE, 3 * PAGE)]}, {}, stream)
    with pytest.raises(ValueError, match="nothing is told of the pages of 'b'"):
        build_tables(tree("a", "b"), {"a": []}, {}, stream)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ([("a", [(0, PAGE)]), ("a", [])], "twice"),
        ([("a", [(0, PAGE - 1)])], "out of order"),
        ([("a", [(PAGE, 2 * PAGE), (0, PAGE)])], "out of order"),
    ],
)
def test_what_is_told_in_another_way_is_refused(told, reason):
    with pytest.raises(ValueError, match=reason):
        unpack_held(PagesOf(space, pack_spans(spans)) for space, spans in told)
