"""A chain: the generations in one directory, how they hang together, and who may add to them.

The way in for everything above: `Chain.open` to read, `Chain.create_or_open`, `lock` and `begin` to
write. What it returns was checked: the digest of a manifest, that it is the generation that its
name says, that it is of this chain, and, in a lineage, that each parent is the one that the child
was made against. Neighbours: `writer` and `reader` do the work on one generation.
"""

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from ckpt.errors import (
    ChainBroken,
    CkptError,
    ImageCorrupt,
    ImageError,
    ImageUnusable,
    NoGeneration,
)
from ckpt.image.access import ANYBODYS, Access
from ckpt.image.format import (
    HEADER_NAME,
    MANIFEST_NAME,
    MAX_GENERATION,
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    TEMPORARY_PREFIX,
    Manifest,
    Parent,
    decode_manifest,
    generation_name,
    parse_generation_name,
    parse_page_file_name,
    parse_replacement_name,
    require_open,
)
from ckpt.image.founding import make_header, require_agreed, require_no_strangers, require_own
from ckpt.image.header import decode_header
from ckpt.image.keys import Recipient
from ckpt.image.newest import known_newest, require_newest
from ckpt.image.runs import ResolvedRuns, RunTable, missing_below, overlay, unresolved
from ckpt.image.sealing import Seal, Sealed, make_sealed
from ckpt.image.store import InUse, Store
from ckpt.image.writer import GenerationWriter, Identity, WriterOptions
from ckpt.units import GenerationNo

RESOLVED_KEPT = 16
"""Resolved spaces that a chain remembers: those of the parent are wanted by each step of a dump."""
_RUNS_KEPT = 1 << 17
"""More spaces than those, as long as all of them have no more runs (some 4 MiB): of many small
processes each is wanted again, too."""


class Chain:
    """An image directory whose header was read; not safe for several threads at once.

    Attributes:
        path: the directory.
        chain_id: 32 hex digits, made at random when the chain was.
        recipients: to whom all of its generations are encrypted; none if they are not.
    """

    def __init__(
        self,
        store: Store,
        chain_id: str,
        recipients: tuple[Recipient, ...] = (),
        access: Access = ANYBODYS,
    ) -> None:
        """Use `open` or `create_or_open`."""
        self.recipients = recipients
        self._private = access.private if recipients else None
        self._store = store
        self.path = store.path
        self.chain_id = chain_id
        self._locked = False
        self._writing = False
        self._fresh = self._fresh_root = False
        self._manifests: dict[GenerationNo, Manifest] = {}
        self._resolved: dict[tuple[GenerationNo, str], ResolvedRuns] = {}
        self._n_runs_kept = 0

    def stay_reachable(self, path: Path) -> None:
        """Find the same directory under another path from now on."""
        self.path = self._store.path = path

    @property
    def store(self) -> Store:
        """The directory, for the rest of the image layer."""
        return self._store

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        access: Access = ANYBODYS,
        *,
        make_store: Callable[[Path], Store] = Store,
    ) -> Self:
        """Open an existing chain; nothing is written and no lock is taken.

        Readers need no lock: what is committed never changes.

        Raises:
            ImageUntrusted: `access` trusts not anybody, and others can write to it. Whatever reads
                files of it later may raise this too.
            ImageUnusable: there is no such directory, it is no image, or it cannot be read.
            ImageSealed: it is encrypted, and to others than the private keys in `access` are of.
            ImageCorrupt: its header is damaged.
            ImageVersion: it is of another major version.
        """
        store = make_store(Path(path))
        if HEADER_NAME not in store.read_names():
            raise ImageUnusable(
                str(path), f"it is not an image directory (it has no file {HEADER_NAME})"
            )
        if not access.trusts_anybody:
            store.be_wary()
        header = store.read_file(HEADER_NAME, max_bytes=MAX_HEADER_BYTES)
        chain_id, recipients = decode_header(header, str(store.path / HEADER_NAME))
        if recipients and access.private:
            require_own(store, recipients, access)
        return cls(store, chain_id, recipients, access)

    @classmethod
    def create_or_open(
        cls,
        path: str | os.PathLike[str],
        access: Access = ANYBODYS,
        *,
        encrypt_to: tuple[Recipient, ...] = (),
        header: bytes | None = None,
        make_store: Callable[[Path], Store] = Store,
    ) -> Self:
        """Open a chain for writing, making the directory and the header where there are none.

        With `encrypt_to` a new chain is encrypted, and all that is ever added to it; one that is
        there must be encrypted to the same. With `header` a new one is a copy of the chain that has
        it; one that is there may be any.

        Raises:
            ImageUnusable: the path is a file, its parent is missing, it is not writable, it is a
                directory with something else in it, or encrypted otherwise.
            ImageSealed: none of the private keys in `access` is of `encrypt_to`.
            ImageBusy: another ckpt is making it at this moment.
            ImageCorrupt, ImageVersion: see `open`.
            HostFull: no room for the header.
        """
        store = make_store(Path(path))
        if encrypt_to and access.private:
            require_own(store, encrypt_to, access)
        made_root = store.make_root()
        names = store.read_names()
        store.require_writable()
        made_header = False
        if HEADER_NAME not in names:
            require_no_strangers(store, names)
            made_header = make_header(store, encrypt_to, made_root=made_root, header=header)
        chain = cls.open(path, access, make_store=make_store)
        require_agreed(store, encrypt_to, chain.recipients)
        chain._fresh, chain._fresh_root = made_header, made_root
        return chain

    # -- reading ---------------------------------------------------------------------------------

    def generations(self) -> list[GenerationNo]:
        """Return the numbers of the committed generations, ascending; none is opened.

        Raises:
            ImageUnusable: the directory is gone or cannot be read.
        """
        numbers = map(parse_generation_name, self._store.read_names())
        return sorted(number for number in numbers if number is not None)

    def newest(self) -> GenerationNo | None:
        """Return the highest number, None for a chain without generations."""
        return max(self.generations(), default=None)

    def require(self, number: GenerationNo | None) -> GenerationNo:
        """Return `number`, or the newest if it is not given.

        Raises:
            NoGeneration: it is not there, or there is none.
            ChainBroken, ImageCorrupt: it is not given, and `require_newest` of `newest` says so.
        """
        wanted = require_newest(self._store, self.chain_id) if number is None else number
        available = self.generations()
        if wanted is None or wanted not in available:
            raise NoGeneration(str(self.path), wanted or GenerationNo(0), _describe(available))
        return wanted

    def next_number(self) -> GenerationNo:
        """Return the number of the next generation: one that none has, nor one that is gone had."""
        known = known_newest(self._store, self.chain_id)
        return GenerationNo(0 if known is None else known + 1)

    def manifest_path(self, number: GenerationNo) -> Path:
        """Return where the manifest of a generation is, for messages."""
        return self.path / generation_name(number) / MANIFEST_NAME

    def manifest(self, number: GenerationNo) -> Manifest:
        """Return the manifest of a generation, checked, and remembered.

        Raises:
            NoGeneration: the chain has none of that number.
            ImageCorrupt, ImageVersion: see `decode_manifest`; or it has another number.
            ChainBroken: it belongs to another chain.
        """
        known = self._manifests.get(number)
        if known is not None:
            return known
        try:
            data = self._store.read_file(
                generation_name(number), MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES
            )
        except ImageCorrupt:
            # Asked only now: a directory of thousands is not to be listed for each of them.
            available = self.generations()
            if number not in available:
                raise NoGeneration(str(self.path), number, _describe(available)) from None
            raise
        path = str(self.manifest_path(number))
        manifest = decode_manifest(data, path, self._private)
        if manifest.generation != number:
            raise ImageCorrupt(
                path, f"it is generation {manifest.generation} under the name of {number}"
            )
        if manifest.chain_id != self.chain_id:
            raise ChainBroken(
                path, f"it belongs to chain {manifest.chain_id}, this is chain {self.chain_id}"
            )
        if manifest.sealed and {key.recipient for key in manifest.sealed.keys} != set(
            self.recipients
        ):
            raise ImageCorrupt(path, "it is encrypted to others than its chain is")
        self._manifests[number] = manifest
        return manifest

    def forget(self) -> None:
        """Remember no manifest any more: memory, and what may have been replaced meanwhile."""
        self._manifests.clear()
        self._resolved.clear()
        self._n_runs_kept = 0

    def seal_of(self, manifest: Manifest) -> Seal | None:
        """Return what opens the frames of a generation; None if it is not encrypted.

        Raises:
            ImageSealed: no private key for it was given.
        """
        require_open(manifest, str(self.manifest_path(manifest.generation)))
        return manifest.sealed.seal if manifest.sealed else None

    def lineage(self, number: GenerationNo) -> list[Manifest]:
        """Return the manifests of `number`, its parent, and so on to the full generation.

        It ends: a manifest is only accepted if its parent has a lower number than itself.

        Raises:
            NoGeneration: the chain has no generation `number`.
            ChainBroken: an ancestor is missing, is not the one that its child was made against, or
                has pages of another size.
            ImageCorrupt, ImageVersion: a manifest on the way is.
        """
        line = [self.manifest(number)]
        while line[-1].parent is not None:
            line.append(self.parent_of(line[-1]))
        return line

    def parent_of(self, child: Manifest) -> Manifest:
        """Return the manifest of the parent of a delta.

        Raises:
            ChainBroken, ImageCorrupt, ImageVersion: see `lineage`.
        """
        parent = child.parent
        if parent is None:
            raise ValueError(f"generation {child.generation} is full")
        path = str(self.manifest_path(parent.generation))
        try:
            found = self.manifest(parent.generation)
        except NoGeneration as error:
            raise ChainBroken(
                path, f"it is missing, and generation {child.generation} was made against it"
            ) from error
        if parent.digest not in found.digests:
            raise ChainBroken(
                path,
                f"it is not the generation {parent.generation} that generation"
                f" {child.generation} was made against (its digest is another)",
            )
        if found.page_size != child.page_size:
            raise ChainBroken(
                path,
                f"its pages have {found.page_size} bytes, those of generation"
                f" {child.generation} {child.page_size}",
            )
        return found

    def resolve(self, number: GenerationNo, space: str) -> ResolvedRuns:
        """Return where each page of a space is, as seen from one generation; remembered.

        The result is shared: treat it as read-only.

        Raises:
            ImageCorrupt: the generation has no such space.
            ChainBroken: see `lineage`; or a page is said to be in a parent that does not have it.
        """
        known = self._resolved.get((number, space))
        if known is not None:
            return known
        line = self.lineage(number)
        if space not in line[0].spaces:
            raise ImageCorrupt(
                str(self.manifest_path(number)), f"it has no page space named {space!r}"
            )
        resolved = self.merge(line, space)
        self._n_runs_kept += len(resolved)
        while len(self._resolved) >= RESOLVED_KEPT and self._n_runs_kept > _RUNS_KEPT:
            self._n_runs_kept -= len(self._resolved.pop(next(iter(self._resolved))))
        self._resolved[number, space] = resolved
        return resolved

    def merge(self, line: Sequence[Manifest], space: str) -> ResolvedRuns:
        """Lay the tables of a part of a lineage over one another, the newest first in `line`.

        What the last of `line` takes from its own parent stays `PARENT`.

        Raises:
            ChainBroken: a page is said to be in a parent, within `line`, that does not have it.
        """
        oldest = line[-1]
        table = oldest.spaces.get(space)
        below = None if table is None else unresolved(table, oldest.generation)
        for manifest in reversed(line[:-1]):
            table = manifest.spaces.get(space)
            # A space that an ancestor does not have hides what older ones had under that name.
            below = None if table is None else self._overlay(manifest, space, table, below)
        if below is None:
            raise AssertionError("the newest has no such space")
        return below

    def _overlay(
        self, manifest: Manifest, space: str, table: RunTable, below: ResolvedRuns | None
    ) -> ResolvedRuns:
        resolved, gaps = overlay(table, manifest.generation, below)
        if gaps:
            raise ChainBroken(
                str(self.manifest_path(manifest.generation)),
                f"it takes {gaps[0]} of {space!r} from its parent, which does not have it",
            )
        return resolved

    # -- writing ---------------------------------------------------------------------------------

    def in_use(self) -> contextlib.AbstractContextManager[InUse]:
        """Keep what is there from being removed, as long as it is read; see `Store.in_use`."""
        return self._store.in_use()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer of this chain, and remove what killed writers left behind.

        If the block fails and the chain was made for it, it is removed again. What was remembered
        of the chain is not: another one may have replaced it until now.

        Raises:
            ImageBusy: another one holds the lock.
            ImageUnusable: the directory cannot be written.
        """
        with self._store.lock():
            self._locked = True
            self.forget()
            try:
                for name in self._store.read_names():
                    if name.startswith(TEMPORARY_PREFIX):
                        self.remove_leftover(name)
                yield
            except (CkptError, KeyboardInterrupt):
                if self._fresh and not self.generations():
                    self._store.remove_fresh(root=self._fresh_root)
                raise
            finally:
                self._locked = False

    def remove_leftover(self, name: str) -> None:
        """Remove what begins with `.tmp-`; and page files that a replacement brought in vain."""
        number = parse_replacement_name(name)
        if number is not None:
            # Of a generation that cannot be read nothing is removed.
            with contextlib.suppress(ImageError):
                for stray in self.list_strays(self.manifest(number)):
                    self._store.remove_file(generation_name(number), stray)
        self._store.remove_temporary(name)

    def list_strays(self, manifest: Manifest) -> list[str]:
        """Return names in the directory of a generation that page files have, and none of its own.

        Raises:
            ImageUnusable: the directory cannot be read.
        """
        known = len(manifest.page_files)
        return [
            name
            for name in self._store.read_names(generation_name(manifest.generation))
            if (place := parse_page_file_name(name)) is not None and place >= known
        ]

    def begin(
        self,
        parent: GenerationNo | None,
        *,
        page_size: int = mmap.PAGESIZE,
        options: WriterOptions | None = None,
    ) -> GenerationWriter:
        """Start the next generation: a full one, or a delta on `parent`.

        State: inside `lock`, and no other writer of this chain is open (`RuntimeError`).

        Raises:
            NoGeneration, ImageCorrupt, ChainBroken, ...: the lineage of `parent` is not whole.
            ImageUnusable: `parent` has pages of another size; or numbers have run out.
            HostFull: no room for a directory.
        """
        if not self._locked or self._writing:
            raise RuntimeError("begin needs the lock of the chain, and one writer at a time")
        number = self.next_number()
        if number > MAX_GENERATION:
            raise ImageUnusable(str(self.path), f"it has had {number} generations: start another")
        identity = Identity(self.chain_id, number, self._parent_of(parent, page_size), page_size)
        writer = GenerationWriter(
            self._store,
            identity,
            options or WriterOptions(),
            sealed=self.seal_new(number),
            check_spaces=lambda spaces: self._check_spaces(parent, spaces),
            on_close=self._writer_closed,
        )
        self._writing = True
        return writer

    def seal_new(self, number: GenerationNo) -> Sealed | None:
        """Return the key of a new generation, never the same again; None: it is not encrypted.

        Raises:
            ImageCorrupt: a recipient of the chain is none that anybody can be.
        """
        if not self.recipients:
            return None
        try:
            return make_sealed(self.recipients, self.chain_id, number)
        except ValueError as error:
            header = str(self.path / HEADER_NAME)
            raise ImageCorrupt(header, "a recipient in it is none that can be") from error

    def _parent_of(self, parent: GenerationNo | None, page_size: int) -> Parent | None:
        if parent is None:
            return None
        manifest = self.lineage(parent)[0]
        if manifest.page_size != page_size:
            raise ImageUnusable(
                str(self.path),
                f"generation {parent} has pages of {manifest.page_size} bytes, this machine of"
                f" {page_size}: take a full generation",
            )
        return Parent(parent, manifest.digest)

    def _check_spaces(self, parent: GenerationNo | None, spaces: Mapping[str, RunTable]) -> None:
        """Refuse a delta that could not be read back; a bug above, found before the commit."""
        if parent is None:
            return
        above = self.manifest(parent).spaces
        for name, table in spaces.items():
            if gaps := missing_below(table, above.get(name)):
                raise ValueError(f"{gaps[0]} of {name!r} is said to be in generation {parent}")

    def _writer_closed(self, manifest: Manifest | None) -> None:
        self._writing = False
        if manifest is not None:
            self.remember(manifest)

    def remember(self, manifest: Manifest) -> None:
        """Keep what was just committed: it can be read, though no private key was given."""
        self._manifests[manifest.generation] = manifest


def _describe(numbers: list[GenerationNo]) -> str:
    """Write which generations there are, in few words."""
    if not numbers:
        return "none yet"
    if len(numbers) == numbers[-1] - numbers[0] + 1 > 2:
        return f"{numbers[0]} to {numbers[-1]}"
    shown = ", ".join(str(number) for number in numbers[-10:])
    return shown if len(numbers) <= 10 else f"..., {shown}"
