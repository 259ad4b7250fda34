"""Who may speak at all: four messages, after which each side knows the other for its own pair.

    sender                                   receiver
    PREFACE (which session, in clear)  ---->           leads the connection to its process
    ... TLS, or ssh ...
    Hello (versions, purpose, nonce)   ---->
                                       <----  Challenge (version, nonce)
    Proof (MAC)                        ---->           compared before anything is done for it
                                       <----  Welcome (MAC, id and key of the session)

A MAC is HMAC-SHA256 by the token's secret (or the key of the session that a connection joins) over
who says it, both nonces, everything else that was said, and the fingerprint of the receiver's
certificate. So it is worth nothing to somebody in between, who has another certificate, nor later,
nor in the other direction. Where certificates of an authority or ssh have proved who is there,
a new session has no secret and both MACs are empty. Neighbours: `tls` below, `dial`, `session`.
"""

import hmac
import secrets
import struct
from collections.abc import Callable

import attrs

from ckpt.errors import (
    ConnectFailed,
    MigrateError,
    NotTrusted,
    PeerLost,
    PeerRefused,
    PeerVersion,
    ProtocolError,
)
from ckpt.image.codec import pack
from ckpt.migrate.channel import Channel
from ckpt.migrate.messages import Challenge, Hello, Proof, Purpose, Refusal, Welcome
from ckpt.migrate.tls import is_about_certificates

OLDEST_VERSION = 3
NEWEST_VERSION = 3

NONCE_BYTES = 32
KEY_BYTES = 32
SESSION_ID_BYTES = 16
NEW_SESSION = b""

BUSY = "busy"
"""`PeerRefused.peer_code` of a receiver that takes no (further) session."""

UNKNOWN_SESSION = "unknown-session"
"""`PeerRefused.peer_code` where the process of a session has ended."""

_PREFACE = struct.Struct("<8s16s")
_PREFACE_MAGIC = b"ckptmig1"
PREFACE_BYTES = _PREFACE.size


@attrs.frozen
class Pairing:
    """What both sides know before the first word."""

    secret: bytes | None = attrs.field(default=None, repr=False)
    """The token's; None where certificates or ssh prove who is there."""
    binding: bytes = b""
    """The fingerprint of the receiver's certificate, where a token has it."""


@attrs.frozen
class Ticket:
    """What further connections of a session are proved with."""

    session_id: bytes
    key: bytes = attrs.field(repr=False)


def make_ticket() -> Ticket:
    """Return a new session's."""
    return Ticket(secrets.token_bytes(SESSION_ID_BYTES), secrets.token_bytes(KEY_BYTES))


def pack_preface(session_id: bytes) -> bytes:
    """Return what a connection begins with; `session_id` may be `NEW_SESSION`."""
    return _PREFACE.pack(_PREFACE_MAGIC, session_id)


def parse_preface(data: bytes) -> bytes:
    """Return the session id of a preface, which proves nothing; `NEW_SESSION` for a new one.

    Raises:
        ValueError: it is none.
    """
    if len(data) != PREFACE_BYTES:
        raise ValueError("the connection ended before it had begun")
    magic, session_id = _PREFACE.unpack(data)
    if magic != _PREFACE_MAGIC:
        raise ValueError("what came is no connection of ckpt")
    return bytes(session_id) if any(session_id) else NEW_SESSION


def greet(channel: Channel, purpose: Purpose, ticket: Ticket | None, pairing: Pairing) -> Ticket:
    """Do the sender's part, within `Patience.handshake_s`, and return the session's ticket.

    Args:
        channel: just opened; the receiver is known by its certificate, or is that of ssh.
        purpose: what the connection is for.
        ticket: of the session that it joins; None to begin one.
        pairing: what the receiver knows too.

    Raises:
        NotTrusted, PeerVersion, PeerRefused, ConnectFailed: no channel; it is to be closed.
    """
    key = ticket.key if ticket else pairing.secret
    hello = Hello(
        oldest_version=OLDEST_VERSION,
        newest_version=NEWEST_VERSION,
        purpose=purpose,
        session_id=ticket.session_id if ticket else NEW_SESSION,
        nonce=secrets.token_bytes(NONCE_BYTES),
    )
    with channel.within(channel.patience.handshake_s):
        try:
            channel.send(hello)
            challenge = channel.receive(Challenge)
            if not OLDEST_VERSION <= challenge.version <= NEWEST_VERSION:
                raise ProtocolError(peer=channel.peer, reason="it took a version of its own")
            said = _transcript(hello, challenge, pairing.binding)
            channel.send(Proof(_mac(key, b"sender", said)))
            welcome = channel.receive(Welcome)
        except MigrateError as error:
            raise _turn_failure(error, channel) from error
    if not hmac.compare_digest(welcome.mac, _mac(key, b"receiver", said)):
        raise NotTrusted(peer=channel.peer, reason="it does not know the secret of the token")
    return ticket or _take_ticket(welcome, channel.peer)


def _take_ticket(welcome: Welcome, peer: str) -> Ticket:
    if (len(welcome.session_id), len(welcome.session_key)) != (SESSION_ID_BYTES, KEY_BYTES):
        raise ProtocolError(peer=peer, reason="the id or the key of its session has a wrong length")
    return Ticket(welcome.session_id, welcome.session_key)


def _turn_failure(error: MigrateError, channel: Channel) -> MigrateError:
    """Say what a failure means as long as nothing was agreed upon."""
    if isinstance(error, PeerRefused):
        if error.peer_code == NotTrusted.code:
            return NotTrusted(peer=channel.peer, reason=f"it says: {error.reason}")
        if error.peer_code == PeerVersion.code:
            ours = _describe_versions(OLDEST_VERSION, NEWEST_VERSION)
            return PeerVersion(peer=channel.peer, theirs=error.reason, ours=ours)
        return error
    if is_about_certificates(error.__cause__):
        return NotTrusted(
            peer=channel.peer, reason="it does not take our certificate (--tls-cert, --tls-ca)"
        )
    if isinstance(error, PeerLost | ProtocolError):
        return nobody_answers(channel.peer, error.reason)
    return error


def nobody_answers(peer: str, reason: str) -> ConnectFailed:
    """Return the error of a connection that came about, but not with one of us."""
    return ConnectFailed(peer=peer, reason=f"no 'ckpt receive' answers there ({reason})")


def admit_all() -> None:
    """Be the `Admit` of those who take whoever has proved itself."""


def answer(
    channel: Channel,
    ticket: Ticket,
    pairing: Pairing,
    *,
    joins: bool = False,
    admit: Callable[[], str | None] = admit_all,
) -> Purpose:
    """Do the receiver's part, within `Patience.handshake_s`, and return what the sender wants.

    Args:
        channel: just accepted; nobody is known yet, or is known by TLS or ssh alone.
        ticket: of the session: the one that is joined, or a new one to be given away.
        pairing: what the sender has to know to begin a session.
        joins: whether the connection came here because its preface names the session.
        admit: called when the sender has proved itself; why it is refused still, or None.

    Raises:
        NotTrusted, PeerVersion, PeerLost, ProtocolError, PeerRefused: no channel. The sender was
            told as much as it may know, and the channel is closed.
    """
    try:
        with channel.within(channel.patience.handshake_s):
            hello = channel.receive(Hello)
            version = _choose_version(channel, hello)
            purpose = _read_purpose(channel, hello, ticket, joins)
            challenge = Challenge(version=version, nonce=secrets.token_bytes(NONCE_BYTES))
            key = ticket.key if joins else pairing.secret
            said = _transcript(hello, challenge, pairing.binding)
            _take_proof(channel, challenge, _mac(key, b"sender", said))
            _let_in(channel, ticket, joins, _mac(key, b"receiver", said), admit)
            return purpose
    except MigrateError:
        channel.close()
        raise


def _take_proof(channel: Channel, challenge: Challenge, mac: bytes) -> None:
    channel.send(challenge)
    proof = channel.receive(Proof)
    if not hmac.compare_digest(proof.mac, mac):
        channel.say_last(Refusal(code=NotTrusted.code, reason="it has another token"))
        raise NotTrusted(peer=channel.peer, reason="it does not know the secret of the token")


def _let_in(
    channel: Channel, ticket: Ticket, joins: bool, mac: bytes, admit: Callable[[], str | None]
) -> None:
    reason = admit()
    if reason is not None:
        channel.say_last(Refusal(code=BUSY, reason=reason))
        raise PeerRefused(peer=channel.peer, peer_code=BUSY, reason=reason)
    key = b"" if joins else ticket.key
    channel.send(Welcome(mac=mac, session_id=ticket.session_id, session_key=key))


def _read_purpose(channel: Channel, hello: Hello, ticket: Ticket, joins: bool) -> Purpose:
    """Return what the sender wants, if it fits the session it came to."""
    if len(hello.nonce) != NONCE_BYTES:
        raise ProtocolError(peer=channel.peer, reason="its nonce has a wrong length")
    if hello.session_id != (ticket.session_id if joins else NEW_SESSION):
        reason = "there is no such session (any more)"
        channel.say_last(Refusal(code=UNKNOWN_SESSION, reason=reason))
        raise ProtocolError(peer=channel.peer, reason="it asks for a session that there is not")
    try:
        purpose = Purpose(hello.purpose)
    except ValueError as error:
        raise ProtocolError(peer=channel.peer, reason="it has an unknown purpose") from error
    if (purpose is Purpose.BEGIN) == joins:
        raise ProtocolError(peer=channel.peer, reason=f"it came to {purpose} the wrong session")
    return purpose


def _choose_version(channel: Channel, hello: Hello) -> int:
    version = min(hello.newest_version, NEWEST_VERSION)
    if version >= max(hello.oldest_version, OLDEST_VERSION):
        return version
    ours = _describe_versions(OLDEST_VERSION, NEWEST_VERSION)
    channel.say_last(Refusal(code=PeerVersion.code, reason=ours))
    theirs = _describe_versions(hello.oldest_version, hello.newest_version)
    raise PeerVersion(peer=channel.peer, theirs=theirs, ours=ours)


def _describe_versions(oldest: int, newest: int) -> str:
    return str(newest) if oldest == newest else f"{oldest} to {newest}"


def _transcript(hello: Hello, challenge: Challenge, binding: bytes) -> bytes:
    """Return everything that was said before a proof, each thing apart from the next."""
    return pack(
        [
            hello.oldest_version,
            hello.newest_version,
            hello.purpose,
            hello.session_id,
            hello.nonce,
            challenge.version,
            challenge.nonce,
            binding,
        ]
    )


def _mac(key: bytes | None, who: bytes, said: bytes) -> bytes:
    if key is None:
        return b""
    return hmac.digest(key, b"ckpt migrate " + who + b"\0" + said, "sha256")
