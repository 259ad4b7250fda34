"""Where each page of a tree that has arrived is, as run tables; made here, of what came.

    held       says the source: these pages count      [        heap          ]   [new    ]
    frames     came in the order of copying, known     1 1 1 1 2 1 1 3 1 2 1 1 3   2 2 3 2
    there      put in place as they came               [        heap          ]
    table      only of what must be read from frames                              DDDDDDDD

The more often memory was written, the longer is a table of the newest copies; to make it would take
the longer, while the tree stands still. What is in place needs none, and `held` is as long as the
tree has holes. Only a chain that is kept has all of it. Neighbours: `taking` knows the frames,
`arrival` commits what is made here.
"""

import mmap
from collections.abc import Iterable, Mapping

from ckpt.engine.pages import build_file_runs, build_runs
from ckpt.engine.records import TreeImage
from ckpt.engine.stream import Copies, Stream, find_newest
from ckpt.image.runs import RunTable
from ckpt.migrate.messages import PagesOf
from ckpt.migrate.spans import unpack_spans
from ckpt.resources.content import CONTENTS, ContentKind
from ckpt.tracker.spans import Spans, intersect, subtract


def unpack_held(told: Iterable[PagesOf]) -> dict[str, Spans]:
    """Return the pages of each page space that count.

    Raises:
        ValueError: they are not told of as `pack_spans` does, or twice.
    """
    held: dict[str, Spans] = {}
    for one in told:
        if one.space in held:
            raise ValueError("the pages of one space are told of twice")
        held[one.space] = unpack_spans(one.spans)
    return held


def build_tables(
    tree: TreeImage, held: Mapping[str, Spans], there: Mapping[str, Spans], stream: Stream
) -> dict[str, RunTable]:
    """Return the run table of each page space of a tree, of what is to be read from frames.

    Args:
        tree: all but its memory.
        held: the pages of each page space that count.
        there: what is in place, of some of the spaces; the tables call it empty.
        stream: what the frames hold that came and were kept.

    Raises:
        ValueError: pages count that did not come, or of a space nothing is told.
    """
    tables: dict[str, RunTable] = {}
    for process in tree.processes:
        if process.has_memory:
            space = process.space
            wanted = subtract(_told(held, space), there.get(space, []))
            copies = _find(stream, space, wanted)
            memory = process.resources["memory"]
            tables[space] = build_runs(memory, copies, [], mmap.PAGESIZE)
        for record in process.resources[CONTENTS.name].contents:
            if record.kind != ContentKind.DIRECTORY:
                n_pages = -(-record.size_bytes // mmap.PAGESIZE)
                wanted = intersect(_told(held, record.space), [(0, n_pages * mmap.PAGESIZE)])
                copies = _find(stream, record.space, wanted)
                tables[record.space] = build_file_runs(n_pages, copies, mmap.PAGESIZE)
    return tables


def _told(held: Mapping[str, Spans], space: str) -> Spans:
    if space not in held:
        raise ValueError(f"nothing is told of the pages of {space!r}")
    return held[space]


def _find(stream: Stream, space: str, wanted: Spans) -> Copies:
    missing = subtract(wanted, stream.covered(space))
    if missing:
        raise ValueError(f"pages of {space!r} did not come, at {missing[0][0]:#x} and elsewhere")
    return find_newest(stream, space, wanted, mmap.PAGESIZE)
