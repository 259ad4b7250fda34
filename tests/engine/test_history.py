"""What a chain tells of its past is what its manifests hold, row by row and part by part."""

import pytest

from ckpt.engine.history import LEVELS, N_BINS, read_history
from ckpt.errors import NoGeneration
from ckpt.image.chain import Chain
from ckpt.image.format import Fate, Kind, RunTableBuilder
from ckpt.units import GenerationNo
from tests.plugins.tree import TOP

GOLDEN = TOP / "images" / "golden" / "format-1.0"
PAGE = 4096


@pytest.fixture
def make_chain(tmp_path):
    """Return a function that commits generations, given what each stores: (space, runs)."""

    def make(*generations):
        chain = Chain.create_or_open(tmp_path / "chain")
        with chain.lock():
            parent = None
            for spaces in generations:
                with chain.begin(parent) as writer:
                    source = writer.write_pages(b"x" * PAGE * 64)
                    tables = {}
                    for name, runs in spaces.items():
                        builder = RunTableBuilder(PAGE)
                        for start, n_pages, fate in runs:
                            builder.add(
                                start * PAGE, n_pages, fate, source if fate is Fate.DATA else 0
                            )
                        tables[name] = builder.build()
                    manifest = commit(writer, tables)
                parent = manifest.generation
        return Chain.open(chain.path)

    return make


def commit(writer, tables):
    return writer.commit(
        spaces=tables, records={}, host={}, tracker="t", reason="", freeze_ms=1, wall_ms=2
    )


def rows_of(chain):
    return {row.name: row for row in read_history(chain, chain.generations()).rows}


def test_rows_add_up_to_what_deltas_have_stored():
    chain = Chain.open(GOLDEN)
    history = read_history(chain, chain.generations())
    for index, (manifest, totals) in enumerate(zip(history.manifests, history.totals, strict=True)):
        told = sum(row.written[index].n_pages for row in history.rows if index in row.written)
        assert told == (totals[Fate.DATA] if manifest.kind is Kind.DELTA else 0)
    assert {row.name for row in history.rows} == {
        space for number in chain.generations() for space in chain.manifest(number).spaces
    }


def test_only_the_generations_asked_for_are_told():
    chain = Chain.open(GOLDEN)
    history = read_history(chain, chain.generations()[-1:])
    assert [one.generation for one in history.manifests] == chain.generations()[-1:]


def test_a_row_grows_goes_and_is_another_one_when_it_is_back(make_chain):
    data, parent = Fate.DATA, Fate.PARENT
    chain = make_chain(
        {"a": [(10, 4, data)]},
        {"a": [(10, 4, parent), (14, 4, data)]},
        {"b": [(0, 1, data)]},
        {"a": [(10, 2, data)]},
    )
    history = read_history(chain, chain.generations())
    first, again = (row for row in history.rows if row.name == "a")
    assert (first.sizes, again.sizes) == ([(0, 4), (1, 8), (2, 0)], [(3, 2)])
    assert {index: one.n_pages for index, one in first.written.items()} == {1: 4}
    assert first.written[1].bins == "0" * 4 + str(LEVELS) * 4


def test_one_page_of_many_is_seen(make_chain):
    whole = [(0, 10_000, Fate.ZERO)]
    chain = make_chain(
        {"a": whole}, {"a": [(0, 9_999, Fate.PARENT), (9_999, 1, Fate.DATA)]}, {"a": whole}
    )
    row = rows_of(chain)["a"]
    assert row.written[1].bins == "0" * (N_BINS - 1) + "1"
    assert list(row.written) == [1]


def test_a_mapping_of_fewer_pages_than_parts_is_told_page_by_page(make_chain):
    chain = make_chain(
        {"a": [(5, 3, Fate.ZERO)]},
        {"a": [(5, 1, Fate.PARENT), (6, 1, Fate.DATA), (7, 1, Fate.PARENT)]},
    )
    assert rows_of(chain)["a"].written[1].bins == f"0{LEVELS}0"


def test_a_generation_that_is_not_there(make_chain):
    chain = make_chain({"a": [(0, 1, Fate.DATA)]})
    with pytest.raises(NoGeneration, match="has no generation 7"):
        read_history(chain, [GenerationNo(7)])
