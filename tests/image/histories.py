"""Histories of chains, drawn by hypothesis: any generations on any older ones."""

from hypothesis import strategies as st

from ckpt.image.format import Fate
from tests.image.chain_model import ModelRun, hard_page, replay, soft_page

N_PAGES = 12
SPACES = ("mm-1", "mm-2")
HOLE = None


def runs_of(fates, contents):
    """Join neighbours of the same fate into runs, as a dump does."""
    runs = []
    for page, fate in enumerate(fates):
        if fate is HOLE:
            continue
        content = contents[page] if fate == Fate.DATA else b""
        last = runs[-1] if runs else None
        if last is not None and last.fate == fate and last.page + last.n_pages == page:
            runs[-1] = ModelRun(last.page, last.n_pages + 1, fate, last.content + content)
        else:
            runs.append(ModelRun(page, 1, fate, content))
    return runs


@st.composite
def histories(draw):
    history = []
    seed = 0
    for number in range(draw(st.integers(1, 5))):
        above = draw(st.none() | st.integers(0, number - 1)) if number else None
        inherited = {} if above is None else replay(history, above)
        spaces = {}
        for space in SPACES[: draw(st.integers(0, len(SPACES)))]:
            fates, contents = [], []
            for page in range(N_PAGES):
                choices = [HOLE, Fate.DATA, Fate.ZERO, Fate.FILE]
                if page in inherited.get(space, {}):
                    # More of these: chains are mostly unchanged pages.
                    choices += [Fate.PARENT] * 6
                fates.append(draw(st.sampled_from(choices)))
                seed += 1
                contents.append(soft_page(seed) if seed % 3 else hard_page(seed))
            spaces[space] = runs_of(fates, contents)
        history.append((above, spaces))
    return history
