"""Checking images: the part that a restore needs before anything is started, and everything.

`verify_for` raises the first error and is for one generation; `verify` walks a whole chain and
collects what it finds. Neighbours: `chain` checks manifests, `reader` reads frames.
"""

from collections.abc import Callable, Iterable, Iterator

from ckpt.errors import ChainBroken, Finding, ImageError
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest, generation_name, page_file_name, replacement_name
from ckpt.image.newest import require_newest
from ckpt.image.reader import Frame, PageReader, check_stored, read_frame
from ckpt.image.runs import ResolvedRuns, missing_below
from ckpt.image.workers import DEFAULT_THREADS, for_each, iter_ahead
from ckpt.units import GenerationNo


def verify_for(
    chain: Chain,
    generation: GenerationNo,
    *,
    decode: bool = False,
    threads: int = DEFAULT_THREADS,
) -> PageReader:
    """Check everything that a restore of `generation` will use, and nothing else.

    That is: the manifests from it to the full one and their digests, that every page resolves, and
    the checksum of every frame that holds one of its pages. With `decode` frames are decompressed
    too, and compared with zstd's own checksum; without, a stored frame that is what was written is
    taken to be good, which is several times quicker (its decoding is checked when it is used).

    Returns:
        The reader, with all manifests in memory.

    Raises:
        ImageError: the first thing that is wrong.
    """
    reader = PageReader(chain, generation, threads=threads)
    spaces = [reader.resolve(space) for space in reader.manifest.spaces]
    verify_frames(chain, reader, spaces, decode=decode, threads=threads)
    return reader


def verify_frames(
    chain: Chain,
    reader: PageReader,
    needed: Iterable[ResolvedRuns],
    *,
    decode: bool = False,
    threads: int = DEFAULT_THREADS,
) -> None:
    """Check the frames that hold pages of `needed`, see `verify_for`.

    Raises:
        ImageError: the first thing that is wrong.
    """

    def check(frame: Frame) -> None:
        if decode:
            read_frame(chain, frame)
        else:
            check_stored(chain, frame)

    for_each(check, iter_needed(reader, needed), threads)


def iter_needed(reader: PageReader, needed: Iterable[ResolvedRuns]) -> Iterator[Frame]:
    """Yield each frame that holds pages of `needed`, once."""
    seen: set[tuple[GenerationNo, int, int]] = set()
    for runs in needed:
        for frame, _ in reader.iter_frames(runs):
            key = (frame.manifest.generation, frame.location.file, frame.location.index)
            if key not in seen:
                seen.add(key)
                yield frame


def verify_sizes(chain: Chain, generation: GenerationNo) -> None:
    """Check that all page files of a lineage are there and as long as they should be.

    Raises:
        ImageError: the first one that is not.
    """
    for manifest in chain.lineage(generation):
        for file in range(len(manifest.page_files)):
            _check_size(chain, manifest, file)


def verify(
    chain: Chain,
    generations: Iterable[GenerationNo] | None = None,
    *,
    threads: int = DEFAULT_THREADS,
    report: Callable[[int], None] | None = None,
) -> list[Finding]:
    """Check generations wholly: manifest, ancestors, that all resolves, every frame decoded.

    Memory: one manifest and its parent's, and a few frames.

    Of what is encrypted to others, frames are only compared with their checksums.

    Args:
        chain: where.
        generations: which, all of the chain if not given. Ancestors' frames are only read if the
            ancestor is among them. That the newest is gone is found in any case.
        threads: that decompress.
        report: called now and then with the stored bytes that were checked so far.

    Returns:
        What is wrong, one line each, in the order of generations; empty if all is well.

    Raises:
        ImageUnusable: the directory itself cannot be read any more.
    """
    findings: list[Finding] = []
    lineages = Lineages(chain)
    done = _Done(report)
    for number in chain.generations() if generations is None else generations:
        chain.forget()
        try:
            manifest = chain.manifest(number)
        except ImageError as error:
            findings.append(_finding(number, error))
            continue
        broken = lineages.error_of(number)
        if broken is not None:
            findings.append(_finding(number, broken))
        findings += _verify_names(chain, manifest)
        findings += _verify_frames(chain, manifest, threads, done)
    findings += _verify_newest(chain)
    return findings


def _finding(number: GenerationNo, error: ImageError) -> Finding:
    return Finding(f"generation {number}", str(error))


class _Done:
    """Counts what was checked."""

    def __init__(self, report: Callable[[int], None] | None) -> None:
        self._report = report
        self._n_bytes = 0

    def add(self, n_bytes: int) -> None:
        self._n_bytes += n_bytes
        if self._report is not None:
            self._report(self._n_bytes)


class Lineages:
    """What keeps generations from being resolved; each is looked at once, and its parent."""

    def __init__(self, chain: Chain) -> None:
        """Nothing was looked at yet."""
        self._chain = chain
        self._known: dict[GenerationNo, ImageError | None] = {}

    def error_of(self, number: GenerationNo) -> ImageError | None:
        """Return the first thing that is wrong on the way to the full generation."""
        line: list[GenerationNo] = []
        error: ImageError | None = None
        at: GenerationNo | None = number
        while at is not None and error is None:
            if at in self._known:
                error = self._known[at]
                break
            line.append(at)
            try:
                at = self._step(at)
            except ImageError as found:
                error = found
        self._known.update(dict.fromkeys(line, error))
        return error

    def _step(self, number: GenerationNo) -> GenerationNo | None:
        """Return the parent, which has what is taken from it."""
        child = self._chain.manifest(number)
        if child.parent is None:
            return None
        parent = self._chain.parent_of(child)
        for name, table in child.spaces.items():
            if gaps := missing_below(table, parent.spaces.get(name)):
                raise ChainBroken(
                    str(self._chain.manifest_path(number)),
                    f"it takes {gaps[0]} of {name!r} from its parent, which does not have it",
                )
        return parent.generation


def _verify_newest(chain: Chain) -> Iterator[Finding]:
    """Yield that the newest generation is gone, or what says which it is."""
    try:
        require_newest(chain.store, chain.chain_id)
    except ImageError as error:
        yield Finding("newest generation", str(error))


def _verify_names(chain: Chain, manifest: Manifest) -> Iterator[Finding]:
    """Yield page files too many, but those of a merge that is under way or was killed."""
    strays = [] if chain.store.leaves_strays else chain.list_strays(manifest)
    if strays and replacement_name(manifest.generation) not in chain.store.read_names():
        for name in strays:
            yield Finding(
                f"generation {manifest.generation}",
                f"its manifest does not know of its file {name}",
            )


def _verify_frames(
    chain: Chain, manifest: Manifest, threads: int, done: _Done
) -> Iterator[Finding]:
    """Yield the frames that are not right; a file that is gone or of another size is one line."""
    index = manifest.frame_index()
    frames: list[Frame] = []
    for file, page_file in enumerate(manifest.page_files):
        try:
            _check_size(chain, manifest, file)
        except ImageError as error:
            yield _finding(manifest.generation, error)
            continue
        frames += (Frame(manifest, index.frame(file, n)) for n in range(len(page_file.frames)))

    def check(frame: Frame) -> ImageError | None:
        try:
            if manifest.is_locked:
                check_stored(chain, frame)
            else:
                read_frame(chain, frame)
        except ImageError as error:
            return error
        return None

    for frame, problem in iter_ahead(check, frames, threads):
        done.add(frame.location.stored_bytes)
        if problem is not None:
            yield _finding(manifest.generation, problem)


def _check_size(chain: Chain, manifest: Manifest, file: int) -> None:
    """Read nothing of a page file, which compares its size."""
    chain.store.read_part(
        generation_name(manifest.generation),
        page_file_name(file),
        offset=0,
        len_bytes=0,
        size_bytes=manifest.page_files[file].size_bytes,
    )
