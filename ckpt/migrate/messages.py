"""Everything that two ckpts say to each other, in one place, by number.

1 to 15 belong to the channel itself; those of a migration begin at 16. A number is never given
twice, and a field is only ever added with a default.
"""

import enum

import attrs

from ckpt.errors import Finding
from ckpt.migrate.message import Message, message


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
