"""The manifest of a generation: bytes to checked objects and back; pure.

images/FORMAT.md is the specification, and the tables there and the code here say the same. Every
decoder takes hostile bytes: lengths are compared with what is there before anything is allocated by
them, every field is checked for its type and range, and what is wrong leaves as `ImageCorrupt` or
`ImageVersion` with the path. Neighbours: `header` has the header of a chain, `runs` and `pages`
own the packed tables, `codec` msgpack, `sealing` what becomes of one that is encrypted.
"""

import enum
import hashlib
import math
import re
import struct
from collections.abc import Collection, Mapping

import attrs

from ckpt.errors import ImageCorrupt, ImageSealed, ImageVersion
from ckpt.image.codec import Fields, pack, unpack
from ckpt.image.keys import KEY_BYTES, TAG_BYTES, PrivateKey, Recipient, WrappedKey
from ckpt.image.pages import MAX_PAGE_SIZE, MIN_PAGE_SIZE, FrameIndex, FrameTable
from ckpt.image.runs import Fate, ResolvedRuns, Run, RunTable, RunTableBuilder
from ckpt.image.sealing import NEEDS_IDENTITY, Locked, Sealed, open_sealed
from ckpt.units import GenerationNo

__all__ = [
    "FORMAT_VERSION",
    "SEALED_VERSION",
    "Fate",
    "Kind",
    "Manifest",
    "PageFile",
    "Parent",
    "ResolvedRuns",
    "Run",
    "RunTable",
    "RunTableBuilder",
    "decode_manifest",
    "encode_manifest",
    "require_open",
]

FORMAT_MAJOR = 1
FORMAT_MINOR = 0
FORMAT_VERSION = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"
SEALED_MAJOR = 2
"""Of chains that are encrypted: who reads only the major version above cannot read them."""
SEALED_MINOR = 0
SEALED_VERSION = f"{SEALED_MAJOR}.{SEALED_MINOR}"
SUPPORTED = f"{FORMAT_MAJOR}.x and {SEALED_MAJOR}.x"
"""For messages."""

HEADER_NAME = "CKPT"
LOCK_NAME = "lock"
MANIFEST_NAME = "manifest"
NEWEST_NAME = "newest"
TEMPORARY_PREFIX = ".tmp-"

MAX_HEADER_BYTES = 4096
MAX_MANIFEST_BYTES = 256 << 20
"""Room for ten million page runs."""
MAX_GENERATION = 999_999
MAX_PAGE_FILES = 10_000
MAX_REPLACED = 4096
"""How often a generation may have been replaced."""
MAX_CREATED_S = 253_402_300_800
"""The year 10000: what `datetime` can show."""

DIGEST_BYTES = 32
MANIFEST_MAGIC = b"CKPTGEN\n"
PREAMBLE = struct.Struct("<8sHHIQ")
"""Magic, major, minor, reserved (0), length of the body in bytes."""

_GENERATION_NAME = re.compile(r"gen-([0-9]{6})", re.ASCII)
_PAGE_FILE_NAME = re.compile(r"pages-(0|[1-9][0-9]{0,3})", re.ASCII)
CHAIN_ID_PATTERN = re.compile(r"[0-9a-f]{32}", re.ASCII)


class Kind(enum.StrEnum):
    """Whether a generation stands alone."""

    FULL = "full"
    DELTA = "delta"


def digest_of(data: bytes | memoryview) -> bytes:
    """Return the digest that closes a manifest: BLAKE2b with 32 bytes of output, no key."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def generation_name(number: GenerationNo) -> str:
    """Return the directory name of a generation."""
    return f"gen-{number:06d}"


def parse_generation_name(name: str) -> GenerationNo | None:
    """Return the number in a directory name, None if it is not one of a generation."""
    match = _GENERATION_NAME.fullmatch(name)
    return GenerationNo(int(match[1])) if match else None


def replacement_name(number: GenerationNo) -> str:
    """Return the name of the directory in which what replaces a generation is made."""
    return f"{TEMPORARY_PREFIX}new-{generation_name(number)}"


def parse_replacement_name(name: str) -> GenerationNo | None:
    """Return the generation that is being replaced in this directory, None if it is none such."""
    prefix = TEMPORARY_PREFIX + "new-"
    return parse_generation_name(name[len(prefix) :]) if name.startswith(prefix) else None


def removed_name(number: GenerationNo) -> str:
    """Return the name of a generation that exists no longer and is being removed."""
    return f"{TEMPORARY_PREFIX}old-{generation_name(number)}"


def parse_page_file_name(name: str) -> int | None:
    """Return the place of a page file in its manifest's list, None if this is not its name."""
    match = _PAGE_FILE_NAME.fullmatch(name)
    return int(match[1]) if match else None


def page_file_name(index: int) -> str:
    """Return the name of the page file number `index` of a generation."""
    return f"pages-{index}"


@attrs.frozen(repr=False)
class Parent:
    """Which generation a delta was made against, and the digest that its manifest had."""

    generation: GenerationNo
    digest: bytes


@attrs.frozen(repr=False)
class PageFile:
    """One page file of a generation; its name is `page_file_name` of its place in the list."""

    size_bytes: int
    frames: FrameTable


@attrs.frozen
class Manifest:
    """Everything of a generation but the content of its pages; immutable, checked, complete.

    Attributes:
        format_version: "major.minor" that it was written with.
        chain_id: 32 hex digits; the same in every generation of a chain.
        generation: its number.
        kind: full or delta; a delta has a `parent`, a full one has none.
        parent: see `Parent`.
        created_s: wall clock at the commit, seconds since 1970.
        page_size: bytes per page, in `spaces` and in page files.
        tracker: which tracker found the pages; any text.
        reason: why it is full, a sentence for people; "" if nothing is to be said.
        freeze_ms: what the target felt.
        wall_ms: how long the whole dump took, up to the commit.
        host: facts of the machine, by the upper layers.
        records: resources by kind, by the upper layers; the image layer does not look inside.
        spaces: page space by name -> its runs, every page of every mapping.
        page_files: where the pages of the `DATA` runs are.
        replaces: digests of the manifests that this one replaced (`squash`): whoever names one of
            them as its parent means this one, which reads the same.
        extra: fields of later minor versions, kept as they came.
        digest: what closes the manifest, b"" while it is being built.
        sealed: how it is encrypted, None if it is not. Without a private key for it, whoever looks
            into `host`, `records` or `extra` gets `ImageSealed`.
    """

    format_version: str
    chain_id: str
    generation: GenerationNo
    kind: Kind
    parent: Parent | None
    created_s: float
    page_size: int
    tracker: str
    reason: str
    freeze_ms: float
    wall_ms: float
    host: Mapping[str, object]
    records: Mapping[str, object]
    spaces: Mapping[str, RunTable]
    page_files: tuple[PageFile, ...]
    replaces: tuple[bytes, ...] = ()
    extra: Mapping[str, object] = attrs.field(factory=dict)
    digest: bytes = b""
    sealed: Sealed | None = None

    @property
    def is_locked(self) -> bool:
        """Whether it is encrypted, and no private key for it was given."""
        return self.sealed is not None and self.sealed.seal is None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all page files."""
        return sum(file.size_bytes for file in self.page_files)

    @property
    def digests(self) -> frozenset[bytes]:
        """Return every digest by which this generation may be named."""
        return frozenset((self.digest, *self.replaces))

    def totals(self) -> dict[Fate, int]:
        """Return the number of pages of each fate, over all spaces."""
        sums = dict.fromkeys(Fate, 0)
        for table in self.spaces.values():
            for fate, n in table.totals().items():
                sums[fate] += n
        return sums

    def frame_index(self) -> FrameIndex:
        """Return the index of all frames; the caller keeps it."""
        return FrameIndex([file.frames for file in self.page_files])

    def validate(self) -> None:
        """Check what needs neither the page files nor the ancestors.

        Raises:
            ValueError: a field is out of range, or the fields contradict each other.
        """
        self._validate_identity()
        size = self.page_size
        if not MIN_PAGE_SIZE <= size <= MAX_PAGE_SIZE or size & (size - 1):
            raise ValueError(f"it has the impossible page size {size}")
        times = (self.freeze_ms, self.wall_ms, self.created_s)
        if not all(math.isfinite(value) and value >= 0 for value in times):
            raise ValueError("a time is negative or no number")
        if self.created_s >= MAX_CREATED_S:
            raise ValueError("it was created in no year that there is")
        if len(self.page_files) > MAX_PAGE_FILES:
            raise ValueError(f"it has more than {MAX_PAGE_FILES} page files")
        n_stream_pages = 0
        for file in self.page_files:
            file.frames.validate(size, file.size_bytes, sealed=self.sealed is not None)
            n_stream_pages += sum(file.frames.n_pages)
        for table in self.spaces.values():
            table.validate(n_stream_pages, parent_allowed=self.kind is Kind.DELTA)

    def _validate_identity(self) -> None:
        if not CHAIN_ID_PATTERN.fullmatch(self.chain_id):
            raise ValueError("its chain id is not 32 hex digits")
        if not 0 <= self.generation <= MAX_GENERATION:
            raise ValueError(f"it has the impossible generation number {self.generation}")
        if (self.kind is Kind.DELTA) != (self.parent is not None):
            raise ValueError("a delta must name a parent, and a full generation must not")
        if self.parent is not None:
            if not 0 <= self.parent.generation < self.generation:
                raise ValueError(
                    f"generation {self.generation} names {self.parent.generation} as its parent,"
                    " which is not older"
                )
            if len(self.parent.digest) != DIGEST_BYTES:
                raise ValueError("its parent's digest has the wrong length")
        if len(self.replaces) > MAX_REPLACED:
            raise ValueError(f"it was replaced {len(self.replaces)} times")
        if any(len(digest) != DIGEST_BYTES for digest in self.replaces):
            raise ValueError("a digest that it replaces has the wrong length")


def require_open(manifest: Manifest, path: str) -> None:
    """Refuse what is encrypted and was not opened.

    Raises:
        ImageSealed: no private key for it was given.
    """
    if manifest.is_locked:
        raise ImageSealed(path, NEEDS_IDENTITY)


def encode_manifest(manifest: Manifest) -> tuple[bytes, bytes]:
    """Encode a manifest; the `digest` that it carries is not looked at.

    Returns:
        The content of the file `manifest`, and the digest that closes it. The caller compares the
        length with `MAX_MANIFEST_BYTES`.

    Raises:
        ValueError: the manifest is not valid, or could not be read back; a bug of the caller.
    """
    manifest.validate()
    body = _encode_body(manifest)
    major, minor = map(int, manifest.format_version.split("."))
    front = PREAMBLE.pack(MANIFEST_MAGIC, major, minor, 0, len(body)) + body
    digest = digest_of(front)
    return front + digest, digest


def _encode_body(manifest: Manifest) -> bytes:
    if manifest.sealed is not None and manifest.sealed.seal is None:
        raise ValueError("it is encrypted, and cannot be written again without its key")
    parent = manifest.parent
    head = {
        "chain": manifest.chain_id,
        "generation": int(manifest.generation),
        "kind": str(manifest.kind),
        "parent": None
        if parent is None
        else {"generation": int(parent.generation), "digest": parent.digest},
        "created_s": float(manifest.created_s),
        "page_size": manifest.page_size,
        "tracker": manifest.tracker,
        "reason": manifest.reason,
        "freeze_ms": float(manifest.freeze_ms),
        "wall_ms": float(manifest.wall_ms),
    }
    secret = {"host": dict(manifest.host), "records": dict(manifest.records)}
    tables = {
        "spaces": {name: table.pack() for name, table in manifest.spaces.items()},
        "page_files": [
            {"size_bytes": file.size_bytes, "frames": file.frames.pack()}
            for file in manifest.page_files
        ],
        **({"replaces": list(manifest.replaces)} if manifest.replaces else {}),
    }
    if manifest.sealed is None or manifest.sealed.seal is None:
        return _pack_readably({**manifest.extra, **head, **secret, **tables})
    beside = _pack_readably({**head, **tables, "keys": _encode_keys(manifest.sealed)})
    hidden = _pack_readably({**manifest.extra, **secret})
    return pack({"open": beside, "sealed": manifest.sealed.seal.seal_records(hidden, beside)})


def _pack_readably(value: dict[str, object]) -> bytes:
    """Pack it, unless it could not be unpacked again: found now, not at restore."""
    packed = pack(value)
    # A record with a number for a key, say, packs and does not unpack.
    unpack(packed)
    return packed


def _encode_keys(sealed: Sealed) -> list[dict[str, bytes]]:
    return [
        {"recipient": key.recipient.raw, "share": key.share, "wrapped": key.wrapped}
        for key in sealed.keys
    ]


def decode_manifest(
    data: bytes, path: str, private: Collection[PrivateKey] | None = None
) -> Manifest:
    """Return the manifest in `data`, which the caller capped at `MAX_MANIFEST_BYTES`.

    The digest is compared before the body is decoded, the version before it is understood.

    Args:
        data: the content of the file.
        path: its name, for messages.
        private: what may open it, if the chain is encrypted; None if it is not.

    Raises:
        ImageCorrupt: cut short, altered, or against the specification; or it is not encrypted, and
            the chain is.
        ImageVersion: whole, and written by another major version.
    """
    try:
        return _decode_manifest(data, path, private)
    except (ValueError, OverflowError) as error:
        raise ImageCorrupt(path, str(error)) from error


def _decode_manifest(data: bytes, path: str, private: Collection[PrivateKey] | None) -> Manifest:
    if len(data) < PREAMBLE.size + DIGEST_BYTES:
        raise ValueError(f"it has {len(data)} bytes, too few for any manifest")
    magic, major, minor, _reserved, body_bytes = PREAMBLE.unpack_from(data)
    if magic != MANIFEST_MAGIC:
        raise ValueError("it is no manifest")
    if len(data) != PREAMBLE.size + body_bytes + DIGEST_BYTES:
        raise ValueError(
            f"it has {len(data)} bytes, it should have {PREAMBLE.size + body_bytes + DIGEST_BYTES}"
        )
    view = memoryview(data)
    digest = digest_of(view[:-DIGEST_BYTES])
    if digest != data[-DIGEST_BYTES:]:
        raise ValueError("its digest is not the one at its end")
    version = f"{major}.{minor}"
    _require_major(major, version, path, sealed=private is not None)
    fields = Fields(unpack(view[PREAMBLE.size : -DIGEST_BYTES]), "the manifest")
    if private is None:
        manifest = _build_manifest(fields, fields, version, digest)
    else:
        manifest = _build_sealed(fields, private, version, digest, path)
    manifest.validate()
    return manifest


def _require_major(major: int, version: str, path: str, *, sealed: bool) -> None:
    if sealed and major == FORMAT_MAJOR:
        raise ValueError("it is not encrypted, and its chain is")
    if major == SEALED_MAJOR and not sealed:
        raise ImageVersion(path, version, f"{FORMAT_MAJOR}.x in a chain that is not encrypted")
    if major not in (FORMAT_MAJOR, SEALED_MAJOR):
        raise ImageVersion(path, version, SUPPORTED)


def _build_sealed(
    fields: Fields, private: Collection[PrivateKey], version: str, digest: bytes, path: str
) -> Manifest:
    """Take an encrypted manifest apart; what no private key opens is `Locked`."""
    beside, hidden = fields.take("open", bytes), fields.take("sealed", bytes)
    shown = Fields(unpack(beside), "its open part")
    keys = tuple(map(_build_key, shown.take("keys", list)))
    chain_id, generation = shown.look("chain", str), shown.look("generation", int)
    if not CHAIN_ID_PATTERN.fullmatch(chain_id) or not 0 <= generation <= MAX_GENERATION:
        raise ValueError("it is of no chain, or of no generation")
    sealed = open_sealed(keys, private, chain_id, generation)
    if sealed.seal is None:
        return _build_manifest(shown, Locked(path), version, digest, sealed)
    # Nothing that it says is used before this: it is of whoever had the key.
    secret = Fields(unpack(sealed.seal.open_records(hidden, beside)), "its encrypted part")
    return _build_manifest(shown, secret, version, digest, sealed)


def _build_key(value: object) -> WrappedKey:
    fields = Fields(value, "an entry of 'keys'")
    recipient, share = fields.take("recipient", bytes), fields.take("share", bytes)
    wrapped = fields.take("wrapped", bytes)
    lengths = len(recipient), len(share), len(wrapped)
    if lengths != (KEY_BYTES, KEY_BYTES, KEY_BYTES + TAG_BYTES):
        raise ValueError("a key in it has the wrong length")
    return WrappedKey(Recipient(recipient), share, wrapped)


def _build_manifest(
    fields: Fields,
    secret: Fields | Locked,
    version: str,
    digest: bytes,
    sealed: Sealed | None = None,
) -> Manifest:
    page_size = fields.take("page_size", int)
    host: Mapping[str, object]
    records: Mapping[str, object]
    if isinstance(secret, Locked):
        host = records = secret
    else:
        host, records = secret.take_map("host"), secret.take_map("records")
    return Manifest(
        format_version=version,
        chain_id=fields.take("chain", str),
        generation=GenerationNo(fields.take("generation", int)),
        kind=Kind(fields.take("kind", str)),
        parent=_build_parent(fields.take_optional("parent")),
        created_s=fields.take("created_s", float),
        page_size=page_size,
        tracker=fields.take("tracker", str),
        reason=fields.take("reason", str),
        freeze_ms=fields.take("freeze_ms", float),
        wall_ms=fields.take("wall_ms", float),
        host=host,
        records=records,
        spaces={
            name: _build_table(name, packed, page_size)
            for name, packed in fields.take_map("spaces").items()
        },
        page_files=tuple(_build_page_file(value) for value in fields.take("page_files", list)),
        replaces=_build_replaces(fields.take_optional("replaces")),
        extra=secret if isinstance(secret, Locked) else {**fields.rest(), **secret.rest()},
        digest=digest,
        sealed=sealed,
    )


def _build_parent(value: object) -> Parent | None:
    if value is None:
        return None
    fields = Fields(value, "'parent'")
    return Parent(GenerationNo(fields.take("generation", int)), fields.take("digest", bytes))


def _build_replaces(value: object) -> tuple[bytes, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(digest, bytes) for digest in value):
        raise ValueError("'replaces' is no array of digests")
    return tuple(value)


def _build_table(name: str, packed: object, page_size: int) -> RunTable:
    if not isinstance(packed, bytes):
        raise ValueError(f"the page space {name!r} has no run table")
    return RunTable.unpack(packed, page_size)


def _build_page_file(value: object) -> PageFile:
    fields = Fields(value, "an entry of 'page_files'")
    return PageFile(fields.take("size_bytes", int), FrameTable.unpack(fields.take("frames", bytes)))
