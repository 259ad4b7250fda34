"""What became of the memory of an image, against a plain dictionary of pages."""

from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.places import Places
from ckpt.units import addr_range

PAGE = 4096
N = 24

pages = st.integers(0, N - 1)
lengths = st.integers(1, 8)
steps = st.one_of(
    st.tuples(st.just("cut"), pages, lengths, st.just(0)),
    st.tuples(st.just("move"), pages, lengths, pages),
)


def begin(spans):
    model = {page: page for first, n in spans for page in range(first, first + n)}
    return Places(addr_range(first * PAGE, n * PAGE) for first, n in spans), model


def apply(places, model, step):
    kind, first, n, to = step
    if kind == "cut":
        places.cut(first * PAGE, (first + n) * PAGE)
        for page in range(first, first + n):
            model.pop(page, None)
        return
    places.move(first * PAGE, to * PAGE, n * PAGE)
    moved = {page: model.pop(page) for page in range(first, first + n) if page in model}
    for page in range(to, to + n):
        model.pop(page, None)
    model.update({page - first + to: origin for page, origin in moved.items()})


def found(places, origin, n):
    """Return page of the image -> page where it is, asked for as a run."""
    result, at, end = {}, origin * PAGE, (origin + n) * PAGE
    while at < end and (spot := places.find(at, end - at)):
        skipped, address, length = spot
        at += skipped
        for offset in range(0, length, PAGE):
            result[(at + offset) // PAGE] = (address + offset) // PAGE
        at += length
    return result


@given(st.lists(steps, max_size=12), pages, lengths)
def test_places_follow_cuts_and_moves(taken, first, n):
    places, model = begin([(0, 5), (7, 3), (12, 6)])
    for step in taken:
        kind, start, length, to = step
        if kind == "move" and abs(start - to) < length:
            continue  # mremap refuses places that overlap
        apply(places, model, step)
        for page in range(2 * N):
            origin = places.origin_of(page * PAGE + 17)
            assert origin == (model[page] * PAGE + 17 if page in model else None)
    back = {origin: page for page, origin in model.items() if first <= origin < first + n}
    assert found(places, first, n) == back


def test_a_copy_goes_its_own_way():
    places, _ = begin([(0, 4)])
    child = places.copy()
    places.cut(0, 2 * PAGE)
    assert child.origin_of(PAGE) == PAGE
    assert places.origin_of(PAGE) is None
