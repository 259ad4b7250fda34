"""Merging generations: a delta takes in what lies between it and an older one, or all there is.

`fold` replaces one generation by one that reads the same and needs fewer ancestors; `squash` makes
a generation full and removes those that nobody needs any more; `prune` uses both. The generation
keeps its number, its records and its own page files. What it takes in comes behind them, so that
nothing of it is written twice (`placing` has what is linked, copied, or cut).

Order, so that a kill or a power cut at any step leaves every generation whole:

    .tmp-new-gen-N/     is made, and synced: whoever finds it later knows that gen-N may have strays
    pages               are written there, and synced; then they are given their names in gen-N,
                        where its old manifest does not name them; gen-N is synced
    manifest            is renamed over the old one: **this one step replaces the generation**
    ancestors           are renamed to `.tmp-old-...`, children first, each synced before the next

Deltas on it, and epochs of living processes, name its old digest: the new manifest lists that in
`replaces`. What is encrypted belongs to its place: it is not linked or copied but decrypted, and
encrypted with the key of the generation, so that takes a private key. Neighbours: `chain` reads
lineages, `writer` writes page files.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

import attrs

from ckpt.errors import ChainBroken, ImageUnusable
from ckpt.image.chain import Chain
from ckpt.image.format import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    MAX_PAGE_FILES,
    MAX_REPLACED,
    Kind,
    Manifest,
    PageFile,
    Parent,
    encode_manifest,
    generation_name,
    page_file_name,
    removed_name,
    replacement_name,
    require_open,
)
from ckpt.image.pages import EncodedFrame, Encoding, FrameLocation
from ckpt.image.pipeline import GATHER_BELOW_BYTES, Compression, FramePipeline
from ckpt.image.placing import Moves, Portion, Span, iter_portions, needed_of
from ckpt.image.reader import Frame, read_frame, read_stored
from ckpt.image.runs import ResolvedRuns, RunTable, missing_below
from ckpt.image.store import Store
from ckpt.image.workers import iter_ahead
from ckpt.image.writer import PAGE_FILE_BYTES, FrameFiles
from ckpt.units import GenerationNo

LINK_AT_MOST_FILES = MAX_PAGE_FILES // 2
"""A generation with so many page files gets no further ones by linking."""


@attrs.frozen
class SquashResult:
    """What became of a chain."""

    generation: GenerationNo
    merged: tuple[GenerationNo, ...]
    """Ancestors that it took in, oldest first; none if it was full before."""
    removed: tuple[GenerationNo, ...]
    """Those of them that are gone."""
    kept: tuple[GenerationNo, ...]
    """Those of them that are still there, since other generations need them."""
    stored_bytes: int
    """Of its page files now."""


def squash(chain: Chain, number: GenerationNo | None = None) -> SquashResult:
    """Make a generation (the newest by default) full, and remove ancestors that nobody else needs.

    What is based on it goes on as before, and so does the next incremental dump.

    Raises:
        NoGeneration: the chain has no such generation, or none at all.
        ImageError: what would be merged is damaged; nothing was changed.
        ImageBusy: the chain is being written, or its pages are being read.
        HostFull: no room; nothing was changed.
    """
    with chain.lock(), chain.in_use() as use:
        use.require_alone()
        wanted = chain.require(number)
        parents = read_parents(chain)
        merged = ancestors_of(parents, wanted)
        result = fold(chain, wanted, None)
        parents[wanted] = None
        rest = set(parents) - set(merged)
        needed = {above for one in rest for above in ancestors_of(parents, one)}
        removed = [one for one in merged if one not in needed]
        with use.alone():
            remove(chain, sorted(removed, reverse=True))
    return SquashResult(
        generation=wanted,
        merged=tuple(sorted(merged)),
        removed=tuple(sorted(removed)),
        kept=tuple(sorted(set(merged) - set(removed))),
        stored_bytes=result.stored_bytes,
    )


def read_parents(chain: Chain) -> dict[GenerationNo, GenerationNo | None]:
    """Return the parent of each generation; remembers no manifest.

    Raises:
        ImageError: a manifest cannot be read: who needs whom is not known then.
    """
    parents: dict[GenerationNo, GenerationNo | None] = {}
    for number in chain.generations():
        parent = chain.manifest(number).parent
        parents[number] = parent.generation if parent else None
        chain.forget()
    return parents


def ancestors_of(
    parents: Mapping[GenerationNo, GenerationNo | None], number: GenerationNo
) -> list[GenerationNo]:
    """Return the parent of a generation, its parent, and so on; missing ones end the list."""
    found: list[GenerationNo] = []
    above = parents.get(number)
    while above is not None and above in parents:
        found.append(above)
        above = parents[above]
    return found


def remove(chain: Chain, newest_first: Iterable[GenerationNo]) -> None:
    """Remove generations, each in one step that is on the disk before the next is begun.

    State: inside `Chain.lock`, and nobody reads; nothing that stays is based on them.

    Raises:
        ImageUnusable: one cannot be renamed; those before it are gone.
    """
    store = chain.store
    for number in newest_first:
        gone = removed_name(number)
        store.rename(generation_name(number), gone)
        store.sync_directory()
        store.remove_temporary(gone)
    chain.forget()


def fold(chain: Chain, number: GenerationNo, base: GenerationNo | None) -> Manifest:
    """Have a generation take in all ancestors up to `base`, which becomes its parent; None: all.

    It reads as before. Nothing happens if `base` is its parent already.

    Memory: the run tables of what is taken in; of pages a few frames at a time.

    State: inside `Chain.lock`.

    Raises:
        ChainBroken: its ancestors are not whole; `base` is none of them.
        ImageCorrupt, ImageVersion: something that must be copied is damaged; nothing was changed.
        ImageSealed: it is encrypted, and there is no private key; nothing was changed.
        HostFull, ImageUnusable: it cannot be written; nothing was changed.
    """
    own, line, below = _read_line(chain, number, base)
    if not line:
        return own
    for one in (own, *line):
        require_open(one, str(chain.manifest_path(one.generation)))
    spaces = {name: chain.merge([own, *line], name) for name in own.spaces}
    _require_whole(chain, own, spaces, below)
    with _replacement(chain, own) as temporary:
        pages = _take_in(chain, temporary, own, line, spaces)
        replaced = attrs.evolve(
            own,
            kind=Kind.FULL if below is None else Kind.DELTA,
            parent=None if below is None else Parent(below.generation, below.digest),
            spaces=pages.spaces,
            page_files=(*own.page_files, *pages.files),
            replaces=(own.digest, *own.replaces),
            digest=b"",
        )
        _publish(chain, temporary, own, replaced)
    chain.forget()
    return chain.manifest(number)


def _read_line(
    chain: Chain, number: GenerationNo, base: GenerationNo | None
) -> tuple[Manifest, list[Manifest], Manifest | None]:
    """Return the generation, those between it and `base`, newest first, and `base`."""
    chain.forget()
    own = chain.manifest(number)
    line: list[Manifest] = []
    at = own
    while at.parent is not None:
        above = chain.parent_of(at)
        if above.generation == base:
            return own, line, above
        # Of those between only the tables are wanted, and there may be thousands.
        chain.forget()
        at = attrs.evolve(above, records={}, host={}, extra={})
        line.append(at)
    if base is not None:
        _broken(chain, own, f"it is not based on generation {base}")
    return own, line, None


def _broken(chain: Chain, manifest: Manifest, reason: str) -> NoReturn:
    raise ChainBroken(str(chain.manifest_path(manifest.generation)), reason)


def _require_whole(
    chain: Chain, own: Manifest, spaces: Mapping[str, ResolvedRuns], below: Manifest | None
) -> None:
    """Refuse to make a delta on a generation that does not have what is taken from it."""
    if below is None:
        return
    for name, runs in spaces.items():
        table = RunTable(runs.page_size, runs.starts, runs.n_pages, runs.fates, runs.sources)
        if gaps := missing_below(table, below.spaces.get(name)):
            _broken(chain, own, f"it takes {gaps[0]} of {name!r} from {below.generation}")


# -- the pages -----------------------------------------------------------------------------------


@attrs.frozen(repr=False)
class _Pages:
    spaces: dict[str, RunTable]
    files: tuple[PageFile, ...]
    """Behind those that the generation has."""


@attrs.define(repr=False)
class _Stream:
    """The page stream of the generation, where it goes on behind its own pages."""

    n_pages: int
    moves: Moves = attrs.field(factory=Moves)

    def take(self, generation: GenerationNo, start: int, end: int) -> None:
        """Append pages of another stream."""
        self.moves.add(generation, start, end, self.n_pages)
        self.n_pages += end - start


def _take_in(
    chain: Chain,
    temporary: str,
    own: Manifest,
    line: Sequence[Manifest],
    spaces: Mapping[str, ResolvedRuns],
) -> _Pages:
    stream = _Stream(sum(sum(file.frames.n_pages) for file in own.page_files))
    portions = list(iter_portions(needed_of(spaces.values(), own.generation), reversed(line)))
    linked, rest = _link(chain.store, temporary, own, portions, stream)
    first = len(own.page_files) + len(linked)
    files = FrameFiles(chain.store, temporary, PAGE_FILE_BYTES, first)
    try:
        _copy(chain, own, rest, files, stream)
        files.finish()
    finally:
        files.close()
    stream.moves.sort()
    return _Pages(
        {name: stream.moves.table_of(runs, own.generation) for name, runs in spaces.items()},
        (*linked, *files.list()),
    )


def _link(
    store: Store, temporary: str, own: Manifest, portions: Iterable[Portion], stream: _Stream
) -> tuple[list[PageFile], list[Portion]]:
    """Link what is worth it; return the page files, and the portions that are to be copied."""
    linked: list[PageFile] = []
    rest: list[Portion] = []
    for portion in portions:
        place = len(own.page_files) + len(linked)
        generation = portion.manifest.generation
        old = (generation_name(generation), page_file_name(portion.file))
        if (
            own.sealed is None
            and place < LINK_AT_MOST_FILES
            and portion.is_worth_linking
            and store.link_file(old, (temporary, page_file_name(place)))
        ):
            linked.append(portion.manifest.page_files[portion.file])
            end = portion.first_page + portion.n_pages
            stream.take(generation, portion.first_page, end)
        else:
            rest.append(portion)
    return linked, rest


def _copy(
    chain: Chain, own: Manifest, portions: Sequence[Portion], files: FrameFiles, stream: _Stream
) -> None:
    """Copy frames as they are stored; then of those that are needed in part, or short, the rest."""
    page_size = own.page_size
    seal = chain.seal_of(own)

    def is_taken_whole(frame: FrameLocation, parts: Sequence[Span]) -> bool:
        if seal is not None:
            return False
        n_needed = sum(end - start for start, end in parts)
        return n_needed == frame.n_pages and n_needed * page_size >= GATHER_BELOW_BYTES

    frames = [
        (Frame(portion.manifest, location), parts)
        for portion in portions
        for location, parts in portion.iter_frames()
    ]
    whole = [frame for frame, parts in frames if is_taken_whole(frame.location, parts)]
    for frame, stored in iter_ahead(lambda frame: read_stored(chain, frame), whole):
        location = frame.location
        encoded = EncodedFrame(stored, Encoding(location.encoding), location.checksum)
        files.append(encoded, location.n_pages)
        first = location.first_page
        stream.take(frame.manifest.generation, first, first + location.n_pages)
    cut = [one for one in frames if not is_taken_whole(one[0].location, one[1])]
    n_frames = sum(len(file.frames) for file in own.page_files)
    pipeline = FramePipeline(files, page_size, Compression(), seal, n_frames)
    try:
        for (frame, parts), raw in iter_ahead(lambda one: read_frame(chain, one[0]), cut):
            view, first = memoryview(raw), frame.location.first_page
            for start, end in parts:
                pipeline.write(view[(start - first) * page_size : (end - first) * page_size])
                stream.take(frame.manifest.generation, start, end)
        pipeline.drain()
    finally:
        pipeline.close()


# -- the steps on disk ---------------------------------------------------------------------------


@contextlib.contextmanager
def _replacement(chain: Chain, own: Manifest) -> Iterator[str]:
    """Lend the directory in which what replaces a generation is made; gone at the end."""
    name = replacement_name(own.generation)
    chain.store.make_directory(name)
    try:
        chain.store.sync_directory()
        yield name
    finally:
        chain.forget()
        chain.remove_leftover(name)


def _publish(chain: Chain, temporary: str, own: Manifest, replaced: Manifest) -> None:
    store, home = chain.store, generation_name(own.generation)
    if len(replaced.page_files) > MAX_PAGE_FILES or len(replaced.replaces) > MAX_REPLACED:
        raise ImageUnusable(
            str(store.path), f"generation {own.generation} was merged with others too often"
        )
    encoded, _ = encode_manifest(replaced)
    if len(encoded) > MAX_MANIFEST_BYTES:
        raise ImageUnusable(
            str(store.path),
            f"the page table of generation {own.generation} would take {len(encoded)} bytes, the"
            f" limit is {MAX_MANIFEST_BYTES}",
        )
    store.write_file(temporary, MANIFEST_NAME, data=encoded)
    for place in range(len(own.page_files), len(replaced.page_files)):
        name = page_file_name(place)
        store.rename(f"{temporary}/{name}", f"{home}/{name}")
    store.sync_directory(home)
    store.rename(f"{temporary}/{MANIFEST_NAME}", f"{home}/{MANIFEST_NAME}")
    store.sync_directory(home)
