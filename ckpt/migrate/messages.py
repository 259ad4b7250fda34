"""Everything that two ckpts say to each other, in one place, by number.

1 to 15 belong to the channel itself; those of a migration begin at 16. A number is never given
twice, and a field is only ever added with a default.
"""

import enum

import attrs

from ckpt.errors import Finding
from ckpt.migrate.message import (
    MAX_FIELD_BYTES,
    FrameMessage,
    Message,
    message,
    require_known_fault,
)


class Purpose(enum.StrEnum):
    """What a connection is for."""

    BEGIN = "begin"
    """A new session."""
    STREAM = "stream"
    """A further stream of a session that is under way."""
    RESUME = "resume"
    """Its first channel again, after a cut."""


@message(1)
@attrs.frozen
class Hello(Message):
    """The first word of whoever connects."""

    oldest_version: int
    newest_version: int
    purpose: str
    """A `Purpose`."""
    session_id: bytes
    """Of the session that this connection belongs to; empty: a new one."""
    nonce: bytes


@message(2)
@attrs.frozen
class Challenge(Message):
    """The answer to it: what is spoken from here on, and what is to be proved."""

    version: int
    nonce: bytes


@message(3)
@attrs.frozen
class Proof(Message):
    """That the one who connects knows the secret; empty where TLS or ssh have proved who it is."""

    mac: bytes = attrs.field(repr=False)


@message(4)
@attrs.frozen
class Welcome(Message):
    """That the one who answers knows it too, and what further connections are proved with."""

    mac: bytes = attrs.field(repr=False)
    session_id: bytes
    session_key: bytes = attrs.field(repr=False)
    """Empty to a connection that belongs to a session already."""


@message(5)
@attrs.frozen
class KeepAlive(Message):
    """Nothing to say, but still there; never handed out by `Channel.receive`."""


@message(6, max_field_bytes=1 << 20)
@attrs.frozen
class Refusal(Message):
    """The last word of a side that will not go on; `Channel.receive` raises it as `PeerRefused`."""

    code: str
    reason: str
    findings: tuple[Finding, ...] = ()


# ---- a migration, in the order in which it is spoken (S: the source, D: the destination)


@attrs.frozen
class Options:
    """What the user of the source wants of the destination."""

    tcp_close: bool = False
    lazy: bool = False


@message(16, max_field_bytes=MAX_FIELD_BYTES)
@attrs.frozen
class Offer(Message):
    """S: everything but the memory, as it was in a short stop, for D to check."""

    manifest: bytes
    """`image.format.encode_manifest`, without page spaces."""
    options: Options


@message(17)
@attrs.frozen
class Accepted(Message):
    """D: this host can run it."""

    chain_id: str
    """Which the manifest of the state has to name."""


@message(18)
@attrs.frozen
class Clocks(Message):
    """S: what the root's clocks show now; D asks by an empty one, to measure the way."""

    monotonic_ns: int = 0
    boottime_ns: int = 0


@message(19)
@attrs.frozen
class Ready(Message):
    """D: pages may come."""

    restore_ms: float
    """What all but the memory will take here, roughly."""


@message(20, max_field_bytes=1 << 17)
@attrs.frozen
class Pages(FrameMessage):
    """S: the next frame of the page stream, and where its pages belong."""

    spaces: tuple[str, ...]
    """Names of page spaces."""
    places: bytes
    """Triples of packed u64: index of the space, start and end of a range in it."""


@message(21)
@attrs.frozen
class RoundEnds(Message):
    """S: all of a round was sent; D: all of it was taken."""

    index: int


@attrs.frozen
class PagesOf:
    """Some pages of a page space."""

    space: str
    spans: bytes
    """See `spans.pack_spans`."""


@message(22, max_field_bytes=MAX_FIELD_BYTES)
@attrs.frozen
class State(Message):
    """S: all pages were sent but those missing; which of them count."""

    manifest: bytes
    """Without records, and without page spaces: D knows which frame was the last with a page."""
    missing: tuple[PagesOf, ...] = ()
    """What was not sent, and can be fetched."""
    held: tuple[PagesOf, ...] = ()
    """Of every page space, all other pages that have content."""


@message(23)
@attrs.frozen
class Prepared(Message):
    """D: all of it is in place and stands still, until S says what becomes of it."""

    prepare_ms: float


@message(24)
@attrs.frozen
class Go(Message):
    """S: the tree here will never run again; let it go there."""


@message(25)
@attrs.frozen
class Running(Message):
    """D: it runs here."""

    pid: int
    finish_ms: float
    warnings: tuple[str, ...] = ()
    ahead_bytes: int = 0
    """Of its memory: what was in place before it stood still."""
    late_bytes: int = 0
    """And after."""


@message(26)
@attrs.frozen
class Abort(Message):
    """S: the tree goes on here; D: it will never run there, or not any more."""

    reason: str
    ran: bool = False
    """D: it may have run there already, without all of its memory; S: so it is lost."""


@message(27)
@attrs.frozen
class WhatNow(Message):
    """S, after a cut: what has become of it? D answers Prepared, Running or Abort."""


@message(29, max_field_bytes=MAX_FIELD_BYTES)
@attrs.frozen
class Tree(Message):
    """S: the tree stands still, and this is all of it but its memory; comes before the `State`."""

    manifest: bytes
    """Without page spaces."""


@message(30)
@attrs.frozen
class Departed(Message):
    """S: the addresses of the tree have left this host; comes before the `State`."""


@message(28)
@attrs.frozen
class Done(Message):
    """S: the answer was heard; nothing more will be asked. D: so was this, unless it is `lazy`."""


# ---- what is still to come when the tree runs there already (`--lazy`)


@message(60)
@attrs.frozen
class Fetch(Message):
    """D, on a further stream: pages are wanted."""

    space: str
    spans: bytes
    """See `spans.pack_spans`."""


@message(61)
@attrs.frozen
class Fetched(FrameMessage):
    """S: just these pages."""


@message(62)
@attrs.frozen
class Complete(Message):
    """D: all pages have come, the source is not needed any more. S answers Done."""


@message(63)
@attrs.frozen
class AllThere(Message):
    """S, after a cut: have all pages come? D answers Complete or Abort when it is known."""


# ---- files that travel along, before the offer, and before the tree if they have changed


@message(40)
@attrs.frozen
class FileBegins(Message):
    """S: a file that is to be there under this name; `FilePart`s of so many bytes follow."""

    path: str
    size: int
    mode: int
    """Permission bits."""
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int


@message(41, max_field_bytes=(1 << 20) + (1 << 10))
@attrs.frozen
class FilePart(Message):
    """S: the next bytes of it."""

    data: bytes = attrs.field(repr=False)


require_known_fault()
