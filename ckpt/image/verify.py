"""Checking images: the part that a restore needs before anything is started, and everything.

`verify_for` raises the first error and is for one generation; `verify` walks a whole chain and
collects what it finds. Neighbours: `chain` checks manifests, `reader` reads frames.
"""

from collections.abc import Iterable, Iterator

from ckpt.errors import Finding, ImageError
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest, generation_name, page_file_name
from ckpt.image.reader import Frame, PageReader, check_stored, read_frame
from ckpt.image.runs import ResolvedRuns
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
) -> list[Finding]:
    """Check generations wholly: manifest, ancestors, that all resolves, every frame decoded.

    Args:
        chain: where.
        generations: which, all of the chain if not given. Ancestors' frames are only read if the
            ancestor is among them.
        threads: that decompress.

    Returns:
        What is wrong, one line each, in the order of generations; empty if all is well.

    Raises:
        ImageUnusable: the directory itself cannot be read any more.
    """
    findings: list[Finding] = []
    for number in chain.generations() if generations is None else generations:
        try:
            manifest = chain.manifest(number)
        except ImageError as error:
            findings.append(_finding(number, error))
            continue
        findings += _verify_lineage(chain, manifest)
        findings += _verify_frames(chain, manifest, threads)
    return findings


def _finding(number: GenerationNo, error: ImageError) -> Finding:
    return Finding(f"generation {number}", str(error))


def _verify_lineage(chain: Chain, manifest: Manifest) -> Iterator[Finding]:
    """Yield what keeps the generation from being resolved; one broken ancestor is one line."""
    try:
        chain.lineage(manifest.generation)
    except ImageError as error:
        yield _finding(manifest.generation, error)
        return
    for space in manifest.spaces:
        try:
            chain.resolve(manifest.generation, space)
        except ImageError as error:
            yield _finding(manifest.generation, error)


def _verify_frames(chain: Chain, manifest: Manifest, threads: int) -> Iterator[Finding]:
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
            read_frame(chain, frame)
        except ImageError as error:
            return error
        return None

    for _, problem in iter_ahead(check, frames, threads):
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
