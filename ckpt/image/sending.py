"""A chain into object storage: what is missing there is sent, and compared once it has arrived.

`send` looks at everything that is there before it sends anything. Then each generation, parents
first:

    pages-0 ...   sent, or kept if they are there with the same content; each is read back, and its
                  digest compared with that of the file here, whose checksums were compared before
    manifest      sent last, only if there is still none, and read back
    newest        sent when all of them are there

So whatever is interrupted, and whenever: what is there is a chain, perhaps a shorter one, and the
same command goes on. A generation that was merged with others since (`squash`, `prune`) is replaced
by what it is now, in the same order: its children name its new digest, and its old page files are
the first of the new ones. Nothing is ever removed there.

A store has no lock. Of two that send the same chain both do the same. Of two that send what has
gone two ways one is told so, by the manifest that is there or by page files that have changed under
its hands. Neighbours: `remote` reads what is there, `copying` has what both directions share.
"""

import enum
import hashlib
from collections.abc import Iterable, Iterator

import attrs

from ckpt.errors import ImageBusy, ImageCorrupt
from ckpt.image.chain import Chain
from ckpt.image.copying import (
    BLOCK_BYTES,
    FORGET_EVERY,
    N_REQUESTS,
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
    NEWEST_NAME,
    Manifest,
    generation_name,
    page_file_name,
)
from ckpt.image.newest import encode_newest, is_noted, present_newest
from ckpt.image.objects import Objects, Stored
from ckpt.image.remote import RemoteStore, key_of
from ckpt.image.workers import iter_ahead
from ckpt.units import GenerationNo


class Standing(enum.Enum):
    """What is there of one generation."""

    MISSING = enum.auto()
    """Nothing that counts."""
    INCOMPLETE = enum.auto()
    """Its manifest, damaged; or page files that are missing or of another size."""
    OLDER = enum.auto()
    """As it was before ours was merged with others."""
    PRESENT = enum.auto()


def send(
    chain: Chain,
    objects: Objects,
    number: GenerationNo | None = None,
    report: ReportProgress = report_nothing,
) -> CopyResult:
    """Send what is missing of all generations, or of the lineage of one.

    Raises:
        NoGeneration: the chain has no generation of that number.
        ChainBroken: another chain is there, or another generation of the same number; or a parent
            is missing here. Nothing was sent.
        ImageUnusable: something else is there; or there is no such bucket.
        ImageCorrupt: a generation here is damaged, and those before it are there; or what arrived
            is not what was sent.
        ImageBusy: somebody else writes there at the same time.
        ConnectFailed, NotPermitted: the store does not answer, or not us.
    """
    with chain.in_use():
        chain.forget()
        wanted = choose(chain, number)
        sending = _Sending(chain, RemoteStore(objects), Tally("sending", report))
        return sending.run(wanted)


@attrs.frozen
class _Arrived:
    """A page file that was compared there, as it was then."""

    key: str
    stored: Stored
    digest: bytes


@attrs.define
class _Sending:
    chain: Chain
    there: RemoteStore
    tally: Tally

    def run(self, wanted: list[GenerationNo]) -> CopyResult:
        found = self.there.find(HEADER_NAME) is not None
        if not found:
            self.there.require_free()
        standings = self._compare(wanted) if found else dict.fromkeys(wanted, Standing.MISSING)
        missing = [one for one in wanted if standings[one] is not Standing.PRESENT]
        for n_done, manifest in enumerate(self._iter_checked(missing)):
            if not n_done and not found:
                self._found()
            self._send_generation(manifest, standings[manifest.generation])
        if not missing and not found:
            self._found()
        self._note_newest(wanted)

        def are(*kinds: Standing) -> tuple[GenerationNo, ...]:
            return tuple(one for one in wanted if standings[one] in kinds)

        return CopyResult(
            chain_id=self.chain.chain_id,
            copied=are(Standing.MISSING, Standing.INCOMPLETE),
            replaced=are(Standing.OLDER),
            present=are(Standing.PRESENT),
            copied_bytes=self.tally.copied_bytes,
            kept_bytes=self.tally.kept_bytes,
        )

    # -- before anything is sent -------------------------------------------------------------------

    def _compare(self, wanted: list[GenerationNo]) -> dict[GenerationNo, Standing]:
        """Say of each generation what is there of it; refuse what is not of our chain."""
        remote = Chain.open(self.there.path, make_store=lambda _: self.there)
        require_same(self.chain, remote)
        there = set(remote.generations())
        standings = dict.fromkeys(wanted, Standing.MISSING)
        for ours in self._iter_manifests(one for one in wanted if one in there):
            standings[ours.generation] = self._standing(ours, remote)
            remote.forget()
        return standings

    def _standing(self, ours: Manifest, remote: Chain) -> Standing:
        number = ours.generation
        if self.there.read_digest(number) == ours.digest:
            complete = all(self._is_as_long(ours, file) for file in range(len(ours.page_files)))
            return Standing.PRESENT if complete else Standing.INCOMPLETE
        try:
            theirs = remote.manifest(number)
        except ImageCorrupt:
            return Standing.INCOMPLETE
        if ours.digest in theirs.digests:
            return Standing.PRESENT
        n_files = len(theirs.page_files)
        if theirs.digest in ours.digests and theirs.page_files == ours.page_files[:n_files]:
            return Standing.OLDER
        raise another(remote, number, self.chain)

    def _is_as_long(self, manifest: Manifest, file: int) -> bool:
        found = self.there.find(generation_name(manifest.generation), page_file_name(file))
        return found is not None and found.size_bytes == manifest.page_files[file].size_bytes

    def _iter_manifests(self, numbers: Iterable[GenerationNo]) -> Iterator[Manifest]:
        for n_done, number in enumerate(numbers):
            if n_done % FORGET_EVERY == 0:
                self.chain.forget()
            yield self.chain.manifest(number)

    def _iter_checked(self, missing: list[GenerationNo]) -> Iterator[Manifest]:
        """Yield those that are to be sent, once all of them were found to have their parents."""
        for manifest in self._iter_manifests(missing):
            if manifest.parent is not None:
                self.chain.parent_of(manifest)
            self.tally.total_bytes += manifest.stored_bytes
        yield from self._iter_manifests(missing)

    # -- sending -----------------------------------------------------------------------------------

    @property
    def _objects(self) -> Objects:
        return self.there.objects

    def _found(self) -> None:
        """Begin the chain."""
        header = self.chain.store.read_file(HEADER_NAME, max_bytes=MAX_HEADER_BYTES)
        self._create(HEADER_NAME, header)
        self.tally.add(len(header))

    def _note_newest(self, wanted: list[GenerationNo]) -> None:
        """Note the newest that is there, unless that or a newer one is noted."""
        chain_id, before = self.chain.chain_id, present_newest(self.there)
        number = max(wanted if before is None else [*wanted, before], default=None)
        if number is None or is_noted(self.there, chain_id, number):
            return
        data = encode_newest(chain_id, number)
        self._objects.put(NEWEST_NAME, data)
        self.there.refresh()
        # Another copy may have noted a newer one since.
        if not is_noted(self.there, chain_id, number):
            raise self._not_arrived(NEWEST_NAME)
        self.tally.add(len(data))

    def _send_generation(self, manifest: Manifest, standing: Standing) -> None:
        number = manifest.generation
        encoded = read_encoded(self.chain, manifest)
        pages = PageFileReader(self.chain.store, generation_name(number), manifest)
        arrived = [self._send_pages(pages, file) for file in range(len(manifest.page_files))]
        key = key_of(number, MANIFEST_NAME)
        if standing is Standing.MISSING:
            self._create(key, encoded)
        else:
            self._objects.put(key, encoded)
            self._require_arrived(key, encoded)
        self.tally.add(len(encoded))
        self._require_still(generation_name(number), arrived)

    def _create(self, key: str, data: bytes) -> None:
        """Have a small object there; another one may have been quicker, with the same."""
        if self._objects.create(key, data):
            self._require_arrived(key, data)
        else:
            self._require_arrived(key, data, ImageBusy(str(self.there.path)))

    def _require_still(self, folder: str, arrived: Iterable[_Arrived]) -> None:
        """Find out whether somebody else has written page files since they were compared."""
        listed = self._objects.list(folder)
        for one in arrived:
            found = listed.get(one.key)
            if found == one.stored and one.stored.mark:
                continue
            size = one.stored.size_bytes
            if (
                found is None
                or found.size_bytes != size
                or self._read_digest(one.key, size) != one.digest
            ):
                raise ImageCorrupt(
                    str(self.there.path / one.key),
                    "somebody else wrote it while it was being sent: let only one copy go there at"
                    " a time, remove it, and copy again",
                )

    def _send_pages(self, pages: PageFileReader, file: int) -> _Arrived:
        """Have a page file there, compared with ours."""
        name = page_file_name(file)
        key, size = f"{pages.folder}/{name}", pages.manifest.page_files[file].size_bytes
        digest = _digest_of(pages.iter_blocks(file))
        if self._is_as_long(pages.manifest, file):
            stored = self._objects.look(key)
            if stored.size_bytes == size and self._read_digest(key, size) == digest:
                self.tally.add(size, kept=True)
                return _Arrived(key, stored, digest)
        if size:
            path = self.chain.path / pages.folder / name
            self._objects.send(key, path, self.tally.show)
        else:
            self._objects.put(key, b"")
        stored = self._objects.look(key)
        if stored.size_bytes != size or self._read_digest(key, size) != digest:
            raise self._not_arrived(key)
        self.tally.add(size)
        return _Arrived(key, stored, digest)

    def _read_digest(self, key: str, size_bytes: int) -> bytes:
        parts = [
            (start, min(start + BLOCK_BYTES, size_bytes))
            for start in range(0, size_bytes, BLOCK_BYTES)
        ]
        blocks = iter_ahead(lambda part: self._objects.read(key, *part), parts, N_REQUESTS)
        return _digest_of(data for _, data in blocks)

    def _require_arrived(self, key: str, data: bytes, otherwise: ImageBusy | None = None) -> None:
        size = self._objects.look(key).size_bytes
        if size != len(data) or self._objects.read(key, 0, size) != data:
            raise otherwise or self._not_arrived(key)

    def _not_arrived(self, key: str) -> ImageCorrupt:
        return ImageCorrupt(str(self.there.path / key), "what arrived is not what was sent")


def _digest_of(blocks: Iterable[bytes | memoryview]) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for block in blocks:
        digest.update(block)
    return digest.digest()
