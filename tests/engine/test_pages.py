"""The promise: each page of each mapping gets the fate that page-by-page reasoning gives it."""

from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.pages import (
    Held,
    build_runs,
    covered,
    own_mappings,
    untrusted_spans,
)
from ckpt.engine.stream import Copied, Stream, find_newest
from ckpt.image.runs import Fate
from ckpt.tracker.base import Scan
from ckpt.tracker.spans import join
from tests.engine.memory_model import PAGE, by_page, memory, pages, spans_of, vma

# -- which pages -----------------------------------------------------------------------------------


def test_own_pages_are_those_of_private_mappings():
    record = memory(
        vma(1, 3),
        vma(3, 5, file=0),
        vma(6, 7, file=0, shared=True),
        vma(8, 9, special="[vdso]"),
        vma(10, 12),
    )
    assert own_mappings(record).all == [(1 * PAGE, 5 * PAGE), (10 * PAGE, 12 * PAGE)]


def test_mergeable_memory_is_not_trusted_to_a_tracker():
    record = memory(vma(1, 3), vma(3, 5, flags=["rd", "mg"]), vma(6, 7, flags=["mg"]))
    assert untrusted_spans(record) == [(3 * PAGE, 5 * PAGE), (6 * PAGE, 7 * PAGE)]


numbers = st.sets(st.integers(0, 30))


@given(numbers, numbers, numbers, numbers)
def test_a_page_is_held_only_if_clean_and_held_before(populated, unwritten, before, untrusted):
    clean = populated & unwritten
    held = Held(spans_of(before))
    wanted = held.see(Scan.of(spans_of(populated), spans_of(clean)), spans_of(untrusted))
    assert pages(held.pages) == before & clean - untrusted
    assert pages(wanted) == populated - pages(held.pages)


@given(numbers, st.lists(st.tuples(numbers, numbers), max_size=5))
def test_what_was_copied_is_not_the_parents(parent, scans):
    """Page by page: who has its content, if anybody does."""
    holder = dict.fromkeys(parent, "parent")
    held, rounds = Held(spans_of(parent)), []
    for populated, unwritten in scans:
        scan = Scan.of(spans_of(populated), spans_of(populated & unwritten))
        wanted = held.see(scan, [])
        holder = {page: who for page, who in holder.items() if page in populated & unwritten}
        assert pages(wanted) == populated - holder.keys()
        held.add(wanted)
        rounds.append(wanted)
        holder |= dict.fromkeys(pages(wanted), "copy")
    copied, left = held.tell_apart(join(span for spans in rounds for span in spans))
    assert pages(copied) == {page for page, who in holder.items() if who == "copy"}
    assert pages(left) == {page for page, who in holder.items() if who == "parent"}


@given(st.lists(numbers, max_size=5), numbers, st.booleans())
def test_the_newest_copy_counts(rounds, wanted, keeps_up):
    """As if each round were put down page by page over those before it."""
    newest = {}
    for number, page in enumerate(page for copied in rounds for page in sorted(copied)):
        newest[page] = number
    held = wanted & newest.keys()
    stream = Stream()
    for copied in rounds:
        stream.append(Copied("mm-1", spans_of(copied)))
        if keeps_up:
            stream.keep_up(PAGE)
    copies = find_newest(stream, "mm-1", spans_of(held), PAGE)
    assert copies == sorted(copies)
    found = {
        start // PAGE + n: source + n
        for start, end, source in copies
        for n in range((end - start) // PAGE)
    }
    assert found == {page: newest[page] for page in held}


@given(st.lists(st.tuples(st.sampled_from("abc"), numbers), max_size=8))
def test_each_address_space_has_what_was_copied_of_it(rounds):
    stream = Stream(Copied(space, spans_of(copied)) for space, copied in rounds)
    there = enumerate((space, page) for space, copied in rounds for page in sorted(copied))
    found = {
        (space, stream.first_page(index, PAGE) + n): page
        for space in "abc"
        for index, one in stream.of(space)
        for n, page in enumerate(sorted(pages(one.spans)))
    }
    assert found == {(space, number): page for number, (space, page) in there}


# -- the run table ---------------------------------------------------------------------------------


@st.composite
def address_spaces(draw):
    """Return a memory record, and of its own pages those stored and those left to the parent."""
    vmas = []
    at = 0
    for _ in range(draw(st.integers(0, 5))):
        at += draw(st.integers(0, 2))  # 0: it touches the one before
        end = at + draw(st.integers(1, 6))
        kind = draw(st.sampled_from(["anonymous", "file", "shared", "[vdso]"]))
        vmas.append(
            vma(
                at,
                end,
                file=0 if kind in ("file", "shared") else -1,
                shared=kind == "shared",
                special=kind if kind == "[vdso]" else "",
            )
        )
        at = end
    record = memory(*vmas)
    own = sorted(pages(own_mappings(record).all))
    fates = draw(st.lists(st.sampled_from("dp-"), min_size=len(own), max_size=len(own)))
    chosen = dict(zip(own, fates, strict=True))
    stored = {page for page, fate in chosen.items() if fate == "d"}
    left = {page for page, fate in chosen.items() if fate == "p"}
    return record, stored, left


def one_round(stored):
    return find_newest(Stream([Copied("mm-1", stored)]), "mm-1", stored, PAGE)


def by_reasoning(record, stored, left):
    """Say for each page what must become of it, one at a time."""
    order = {page: index for index, page in enumerate(sorted(stored))}
    result = {}
    for one in record.vmas:
        for page in range(one.start // PAGE, one.end // PAGE):
            if one.special:
                continue
            if page in stored:
                result[page] = (Fate.DATA, order[page])
            elif page in left:
                result[page] = (Fate.PARENT, None)
            else:
                result[page] = (Fate.FILE if one.file >= 0 else Fate.ZERO, None)
    return result


@given(address_spaces())
def test_every_page_of_every_mapping_has_the_right_fate(space):
    record, stored, left = space
    table = build_runs(record, one_round(spans_of(stored)), spans_of(left), PAGE)
    assert by_page(table) == by_reasoning(record, stored, left)
    table.validate(len(stored), parent_allowed=True)


@given(address_spaces(), st.data())
def test_spans_may_be_cut_anywhere(space, drawn):
    """Pages arrive in chunks: a span that was cut is no other span."""
    record, stored, left = space
    pieces = []
    for start, end in spans_of(stored):
        cut = drawn.draw(st.integers(start // PAGE, end // PAGE)) * PAGE
        pieces += [piece for piece in ((start, cut), (cut, end)) if piece[0] < piece[1]]
    table = build_runs(record, one_round(pieces), spans_of(left), PAGE)
    assert by_page(table) == by_reasoning(record, stored, left)


@given(address_spaces())
def test_what_a_table_covers_are_its_pages_with_content(space):
    record, stored, left = space
    table = build_runs(record, one_round(spans_of(stored)), spans_of(left), PAGE)
    assert pages(covered(table)) == stored | left
