"""A chain into a directory, from object storage or from another directory.

`fetch` looks at all that is wanted before it writes anything. Then each generation that is missing,
parents first, is checked as `ckpt verify` does while it comes, and appears in one step:

    .part-gen-N/    is made; page files are written there, each synced
    manifest        comes behind them, synced; then .part-gen-N is
    gen-N           is what it is renamed to: **this one step makes the generation exist**
    newest          is written, once all of them are there

What is interrupted leaves `.part-gen-N`, which readers ignore, and which the next fetch goes on
with: of page files that are whole nothing is fetched again. A generation that was merged with
others in the source since is replaced by what it is now, in the steps of `squash`. Neighbours:
`remote` is where it comes from, `sending` the way back, `copying` what both share.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import attrs

from ckpt.errors import ImageError
from ckpt.image.chain import Chain
from ckpt.image.copying import (
    FORGET_EVERY,
    CopyResult,
    PageFileReader,
    ReportProgress,
    Tally,
    another,
    choose,
    read_encoded,
    report_nothing,
    require_same,
)
from ckpt.image.format import (
    HEADER_NAME,
    MANIFEST_NAME,
    MAX_HEADER_BYTES,
    TEMPORARY_PREFIX,
    Manifest,
    generation_name,
    page_file_name,
    replacement_name,
)
from ckpt.image.newest import is_noted, present_newest, write_newest
from ckpt.image.store import InUse, Store
from ckpt.image.verify import Lineages
from ckpt.units import GenerationNo

PART_PREFIX = ".part-"
"""Not `.tmp-`: whoever takes the lock removes those, and a gigabyte is not to come twice."""


def fetch(
    source: Chain,
    path: str | os.PathLike[str],
    number: GenerationNo | None = None,
    report: ReportProgress = report_nothing,
) -> CopyResult:
    """Fetch what is missing in a directory of all generations, or of the lineage of one.

    The directory is made if it is not there (0700, its files 0600); then it is of the same chain.

    Raises:
        NoGeneration: the source has no generation of that number.
        ChainBroken: another chain is there, or another generation of the same number.
        ImageUnusable: something else is there.
        ImageCorrupt, ImageVersion: one in the source is damaged; those before it are there.
        ImageBusy: somebody else writes there; or reads there, and a generation is to be replaced.
        HostFull: no room; what is whole stays.
        ConnectFailed, NotPermitted: the store does not answer, or not us.
    """
    with source.in_use():
        source.forget()
        wanted = choose(source, number)
        header = source.store.read_file(HEADER_NAME, max_bytes=MAX_HEADER_BYTES)
        Chain.create_or_open(path, header=header)
        # Opened again: what was begun just now stays if this fails, for the next time.
        target = Chain.open(Path(path))
        require_same(source, target)
        with target.lock(), target.in_use() as use:
            return _Fetching(source, target, use, Tally("fetching", report)).run(wanted)


@attrs.define
class _Fetching:
    source: Chain
    target: Chain
    use: InUse
    tally: Tally

    @property
    def _store(self) -> Store:
        return self.target.store

    def run(self, wanted: list[GenerationNo]) -> CopyResult:
        have = set(self.target.generations())
        here = [one for one in wanted if one in have]
        older = {one.generation for one in self._iter_manifests(here) if self._is_older(one)}
        if older:
            self.use.require_alone()
        missing = [one for one in wanted if one not in have]
        self._remove_parts_but(missing)
        todo = [one for one in wanted if one in older or one not in have]
        for manifest in self._iter_manifests(todo):
            self.tally.total_bytes += manifest.stored_bytes
        lineages = Lineages(self.source)
        for manifest in self._iter_manifests(todo):
            broken = lineages.error_of(manifest.generation)
            if broken is not None:
                raise broken
            if manifest.generation in older:
                self._replace_generation(manifest)
            else:
                self._fetch_generation(manifest)
        self._note_newest()
        return CopyResult(
            chain_id=self.target.chain_id,
            copied=tuple(missing),
            replaced=tuple(sorted(older)),
            present=tuple(one for one in here if one not in older),
            copied_bytes=self.tally.copied_bytes,
            kept_bytes=self.tally.kept_bytes,
        )

    def _note_newest(self) -> None:
        store, chain_id = self._store, self.target.chain_id
        present = present_newest(store)
        if present is not None and not is_noted(store, chain_id, present):
            write_newest(store, chain_id, present)

    def _iter_manifests(self, numbers: list[GenerationNo]) -> Iterator[Manifest]:
        for n_done, number in enumerate(numbers):
            if n_done % FORGET_EVERY == 0:
                self.source.forget()
                self.target.forget()
            yield self.source.manifest(number)

    def _is_older(self, theirs: Manifest) -> bool:
        """Tell whether it is here as it was before it was merged with others there.

        Raises:
            ChainBroken: it is here as another one.
        """
        ours = self.target.manifest(theirs.generation)
        if theirs.digest in ours.digests:
            return False
        n_files = len(ours.page_files)
        if ours.digest in theirs.digests and ours.page_files == theirs.page_files[:n_files]:
            return True
        raise another(self.target, ours.generation, self.source)

    # -- one generation ----------------------------------------------------------------------------

    def _remove_parts_but(self, missing: list[GenerationNo]) -> None:
        """Remove what was left of generations that nobody wants now."""
        wanted = {PART_PREFIX + generation_name(number) for number in missing}
        for name in self._store.read_names():
            if name.startswith(PART_PREFIX) and name not in wanted:
                gone = TEMPORARY_PREFIX + name[1:]
                self._store.rename(name, gone)
                self._store.remove_temporary(gone)

    def _fetch_generation(self, manifest: Manifest) -> None:
        store, number = self._store, manifest.generation
        encoded = read_encoded(self.source, manifest)
        part = PART_PREFIX + generation_name(number)
        names = [page_file_name(file) for file in range(len(manifest.page_files))]
        if part not in store.read_names():
            store.make_directory(part)
        for name in store.read_names(part):
            if name not in names:
                store.remove_file(part, name)
        for file, name in enumerate(names):
            self._fetch_pages(manifest, part, file, name)
        store.write_file(part, MANIFEST_NAME, data=encoded)
        self.tally.add(len(encoded))
        store.sync_directory(part)
        store.rename(part, generation_name(number))
        store.sync_directory()

    def _replace_generation(self, manifest: Manifest) -> None:
        """Put what was merged there in the place of what is here, as `squash` does."""
        store, number = self._store, manifest.generation
        encoded = read_encoded(self.source, manifest)
        n_own = len(self.target.manifest(number).page_files)
        names = [page_file_name(file) for file in range(n_own, len(manifest.page_files))]
        temporary, home = replacement_name(number), generation_name(number)
        store.make_directory(temporary)
        try:
            store.sync_directory()
            for file, name in enumerate(names, n_own):
                self._fetch_pages(manifest, temporary, file, name)
            store.write_file(temporary, MANIFEST_NAME, data=encoded)
            for name in names:
                store.rename(f"{temporary}/{name}", f"{home}/{name}")
            store.sync_directory(home)
            store.rename(f"{temporary}/{MANIFEST_NAME}", f"{home}/{MANIFEST_NAME}")
            store.sync_directory(home)
        finally:
            self.target.forget()
            self.target.remove_leftover(temporary)
        self.tally.add(len(encoded))

    def _fetch_pages(self, manifest: Manifest, part: str, file: int, name: str) -> None:
        store, size = self._store, manifest.page_files[file].size_bytes
        if name in store.read_names(part):
            if self._is_whole(PageFileReader(store, part, manifest, decodes=True), file):
                self.tally.add(size, kept=True)
                return
            store.remove_file(part, name)
        folder = generation_name(manifest.generation)
        pages = PageFileReader(self.source.store, folder, manifest, decodes=True)
        done = 0
        fd = store.create_file(part, name)
        try:
            for block in pages.iter_blocks(file):
                store.append(fd, block)
                done += len(block)
                self.tally.show(done)
            store.sync_file(fd)
        except BaseException:
            store.remove_file(part, name)
            raise
        finally:
            store.close_file(fd)
        self.tally.add(size)

    def _is_whole(self, pages: PageFileReader, file: int) -> bool:
        try:
            for _ in pages.iter_blocks(file):
                pass
        except ImageError:
            return False
        return True
