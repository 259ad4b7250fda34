"""A chain in object storage, for those who read it: the same files under a URL, no directory.

    s3://bucket/job/CKPT                          first
    s3://bucket/job/gen-000000/pages-0            in any order
    s3://bucket/job/gen-000000/manifest           last: **this object makes the generation exist**
    s3://bucket/job/newest                        behind all generations

A store has no directories, renames or locks, so a generation counts once its manifest is there.
Names of the listing that are not exactly one of these are as good as absent. With a `RemoteStore`
under it a `Chain` reads, and checks, as it does in a directory. Neighbours: `objects` has the
requests, `sending` writes chains there.
"""

import contextlib
from collections.abc import Iterator
from typing import NoReturn

from ckpt.errors import ImageCorrupt, ImageUntrusted, ImageUnusable
from ckpt.image.access import ANYBODYS, Access
from ckpt.image.chain import Chain
from ckpt.image.format import (
    DIGEST_BYTES,
    HEADER_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    NEWEST_NAME,
    TEMPORARY_PREFIX,
    generation_name,
    parse_generation_name,
    parse_page_file_name,
)
from ckpt.image.objects import WHOSE, Objects, Stored, UrlPath
from ckpt.image.store import InUse, Store
from ckpt.units import GenerationNo


def key_of(number: GenerationNo, name: str) -> str:
    """Return the name, behind the URL, of a file of a generation."""
    return f"{generation_name(number)}/{name}"


def _is_of_chain(key: str) -> bool:
    """Tell the names that a chain has from all others, which are never used."""
    if key in _BESIDE:
        return True
    folder, _, name = key.partition("/")
    if parse_generation_name(folder) is None:
        return False
    return name == MANIFEST_NAME or parse_page_file_name(name) is not None


_BESIDE = frozenset({HEADER_NAME, NEWEST_NAME})
"""What a chain has beside its generations."""


class RemoteStore(Store):
    """Stands for the directory of a chain; what is there was listed once, see `refresh`."""

    leaves_strays = True

    def __init__(self, objects: Objects) -> None:
        """List what is there.

        Raises:
            ConnectFailed, NotPermitted, ImageUnusable: the store does not tell.
        """
        super().__init__(UrlPath(objects.url))
        self.objects = objects
        self._listed: dict[str, Stored] = {}
        self._last: tuple[str, bytes] = ("", b"")
        """What was read last: a manifest is wanted as an object, and as it is."""
        self.refresh()

    def refresh(self) -> None:
        """List again, and remember nothing that was read."""
        self._last = "", b""
        self._all = self.objects.list()
        self._listed = {key: one for key, one in self._all.items() if _is_of_chain(key)}

    def require_free(self) -> None:
        """Refuse to begin a chain where there is something else.

        Raises:
            ImageUnusable: there is.
        """
        for key in sorted(self._all):
            if key and key != LOCK_NAME and not key.startswith(TEMPORARY_PREFIX):
                raise ImageUnusable(
                    str(self.path), f"it holds no chain, and is not empty (it has {key!r})"
                )

    def find(self, *parts: str) -> Stored | None:
        """Return what is known of a file; None if it was not there."""
        return self._listed.get("/".join(parts))

    def read_names(self, *parts: str) -> list[str]:
        """See `Store.read_names`; a generation without its manifest is none."""
        if parts:
            start = "/".join((*parts, ""))
            return sorted(key[len(start) :] for key in self._listed if key.startswith(start))
        end = f"/{MANIFEST_NAME}"
        names = [key.removesuffix(end) for key in self._listed if key.endswith(end)]
        return sorted([*names, *(_BESIDE & self._listed.keys())])

    def read_file(self, *parts: str, max_bytes: int) -> bytes:
        """See `Store.read_file`."""
        key = "/".join(parts)
        if self._last[0] != key:
            size = self._require(key).size_bytes
            if size > max_bytes:
                raise ImageCorrupt(
                    str(self.path / key), f"it has {size} bytes, the limit is {max_bytes}"
                )
            self._last = key, self.objects.read(key, 0, size)
        return self._last[1]

    def read_part(
        self,
        *parts: str,
        offset: int,
        len_bytes: int,
        size_bytes: int,
        into: bytearray | None = None,
    ) -> bytes | memoryview:
        """See `Store.read_part`; safe in any thread."""
        key = "/".join(parts)
        size = self._require(key).size_bytes
        if size != size_bytes:
            raise ImageCorrupt(
                str(self.path / key), f"it has {size} bytes, its manifest says {size_bytes}"
            )
        data = self.objects.read(key, offset, offset + len_bytes)
        if into is None:
            return data
        into[:len_bytes] = data
        return memoryview(into)[:len_bytes]

    def read_digest(self, number: GenerationNo) -> bytes:
        """Return the digest at the end of a manifest, of which nothing else is read.

        Raises:
            ImageCorrupt: it is not there, or too short.
        """
        key = key_of(number, MANIFEST_NAME)
        size = self._require(key).size_bytes
        return self.objects.read(key, max(size - DIGEST_BYTES, 0), size)

    def _require(self, key: str) -> Stored:
        found = self._listed.get(key)
        if found is None:
            raise ImageCorrupt(str(self.path / key), "it is missing")
        return found

    def be_wary(self) -> NoReturn:
        """Raise `ImageUntrusted`."""
        raise ImageUntrusted(str(self.path), WHOSE)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[InUse]:
        """Hold nothing: a store has no locks."""
        yield InUse(self.path, -1)

    def lock(self) -> NoReturn:
        """Raise `ImageUnusable`."""
        raise ImageUnusable(str(self.path), "only 'ckpt copy' writes to object storage")


def open_remote(objects: Objects, access: Access = ANYBODYS) -> Chain:
    """Open the chain under a URL.

    Raises:
        ImageError: see `Chain.open`.
        ConnectFailed, NotPermitted: the store does not answer, or not us.
    """
    store = RemoteStore(objects)
    return Chain.open(store.path, access, make_store=lambda _: store)
