"""Pages that were copied of one process stand for those of another, at every point of a stream."""

from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.stream import Alias, Copied, Stream, all_copied, find_newest
from ckpt.tracker.spans import join, total_bytes

PAGE = 4096
SPACES = ["a", "b", "c"]


@st.composite
def streams(draw):
    """A stream, and what a plain model says of it: (space, page) -> ordinal of its newest copy."""
    stream, newest, n_pages = [], {}, 0
    for _ in range(draw(st.integers(0, 8))):
        space, source = draw(st.permutations(SPACES))[:2]
        pages = sorted(draw(st.sets(st.integers(0, 9), max_size=8)))
        if draw(st.booleans()):
            for page in pages:
                newest[space, page] = n_pages
                n_pages += 1
            stream.append(Copied(space, spans_of(pages)))
        else:
            # Only what the source has by then.
            pages = [page for page in pages if (source, page) in newest]
            newest |= {(space, page): newest[source, page] for page in pages}
            stream.append(Alias(space, spans_of(pages), source))
    return stream, newest


def spans_of(pages):
    return join((page * PAGE, (page + 1) * PAGE) for page in pages)


@given(streams(), st.sampled_from(SPACES))
def test_the_newest_copy_is_found_through_aliases(made, space):
    stream, newest = made
    wanted = {page: ordinal for (of, page), ordinal in newest.items() if of == space}
    held = spans_of(wanted)
    assert all_copied(Stream(stream), space) == held
    found = find_newest(Stream(stream), space, held, PAGE)
    assert sum(end - start for start, end, _ in found) == total_bytes(held)
    assert {
        at // PAGE: source + (at - start) // PAGE
        for start, end, source in found
        for at in range(start, end, PAGE)
    } == wanted
