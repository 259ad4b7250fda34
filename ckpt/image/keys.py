"""Who can read an encrypted image: recipients, private keys, and the files that hold them.

A recipient is an X25519 public key (RFC 7748), a text that anybody may know. A generation has a key
of its own, which is in its manifest once for each recipient, wrapped so that only the private key
opens it: whoever dumps needs the recipient and nothing secret. Neighbours: `sealing` uses the
generation's key, `access` brings private keys along, `chain` holds the recipients of its header.

`cryptography` takes 40 ms to import: only those who encrypt pay for it.
"""

import base64
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import attrs

from ckpt.errors import UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

K = TypeVar("K", "PrivateKey", "Recipient")

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
"""What AES-GCM adds to what it encrypts."""
SEAL_BYTES = NONCE_BYTES + TAG_BYTES
"""What a frame gets longer by; its nonce goes before it, its tag behind it."""
MAX_RECIPIENTS = 32

_RECIPIENT_PREFIX = "ckpt1"
_PRIVATE_PREFIX = "CKPT-PRIVATE-KEY-1"
_SUM_BYTES = 3
"""With the key, a whole number of base 32 digits."""
_MAX_FILE_BYTES = 1 << 16
_ONCE = bytes(NONCE_BYTES)
"""The nonce of keys that encrypt one thing only."""


def _encode(raw: bytes) -> str:
    """Write a key as text in which a typing error shows."""
    check = hashlib.blake2b(raw, digest_size=_SUM_BYTES).digest()
    return base64.b32encode(raw + check).decode("ascii")


def _decode(text: str) -> bytes:
    """Read what `_encode` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        raw = base64.b32decode(text)
    except ValueError as error:
        raise ValueError("it is no base 32") from error
    if len(raw) != KEY_BYTES + _SUM_BYTES or _encode(raw[:KEY_BYTES]) != text:
        raise ValueError("it is not complete, or has a typing error")
    return raw[:KEY_BYTES]


@attrs.frozen
class Recipient:
    """A public key: to whom an image is encrypted."""

    raw: bytes

    def __str__(self) -> str:
        """Return it as text: `ckpt1` and 56 digits of base 32, lower case."""
        return _RECIPIENT_PREFIX + _encode(self.raw).lower()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote.

        Raises:
            ValueError: it is something else, or has a typing error.
        """
        if not text.startswith(_RECIPIENT_PREFIX) or text != text.lower():
            raise ValueError(f"it does not begin with {_RECIPIENT_PREFIX}")
        return cls(_decode(text.removeprefix(_RECIPIENT_PREFIX).upper()))


@attrs.frozen
class PrivateKey:
    """What opens the images of one recipient."""

    raw: bytes = attrs.field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        """Make a new one."""
        # Any 32 bytes are a private key of X25519.
        return cls(os.urandom(KEY_BYTES))

    def __str__(self) -> str:
        """Return it as text, for its file."""
        return _PRIVATE_PREFIX + _encode(self.raw)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote.

        Raises:
            ValueError: it is something else, or has a typing error.
        """
        if not text.startswith(_PRIVATE_PREFIX):
            raise ValueError(f"it does not begin with {_PRIVATE_PREFIX}")
        return cls(_decode(text.removeprefix(_PRIVATE_PREFIX)))

    @property
    def recipient(self) -> Recipient:
        """Its public half."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        key = X25519PrivateKey.from_private_bytes(self.raw)
        return Recipient(key.public_key().public_bytes_raw())


# -- the key of a generation, wrapped ------------------------------------------------------------


@attrs.frozen(repr=False)
class WrappedKey:
    """A generation's key, for one recipient."""

    recipient: Recipient
    share: bytes
    """The public half of a key pair that was made for this and forgotten."""
    wrapped: bytes


def wrap(key: bytes, recipient: Recipient, what: bytes) -> WrappedKey:
    """Encrypt the key of a generation to a recipient.

    Args:
        key: `KEY_BYTES`.
        recipient: who can open it.
        what: it is for; who opens it must say the same.

    Raises:
        ValueError: nobody can have the private half of `recipient`.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    once = X25519PrivateKey.generate()
    share = once.public_key().public_bytes_raw()
    secret = once.exchange(X25519PublicKey.from_public_bytes(recipient.raw))
    cipher = _wrapping(secret, share, recipient)
    return WrappedKey(recipient, share, cipher.encrypt(_ONCE, key, what))


def unwrap(wrapped: WrappedKey, private: PrivateKey, what: bytes) -> bytes:
    """Return the key of a generation; `private` is that of its recipient.

    Raises:
        ValueError: it was altered, or is the key of something else.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    key = X25519PrivateKey.from_private_bytes(private.raw)
    secret = key.exchange(X25519PublicKey.from_public_bytes(wrapped.share))
    cipher = _wrapping(secret, wrapped.share, wrapped.recipient)
    try:
        return cipher.decrypt(_ONCE, wrapped.wrapped, what)
    except InvalidTag as error:
        raise ValueError("its key does not open: it was altered, or is of elsewhere") from error


def _wrapping(secret: bytes, share: bytes, recipient: Recipient) -> "AESGCM":
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    salt = share + recipient.raw
    key = HKDF(SHA256(), KEY_BYTES, salt, b"ckpt image 2: wrap").derive(secret)
    return AESGCM(key)


# -- files ---------------------------------------------------------------------------------------


def read_private_keys(path: str | os.PathLike[str]) -> tuple[PrivateKey, ...]:
    """Read the keys in a file of `write_private_key`; lines that begin with `#` are skipped.

    Raises:
        UsageError: it cannot be read, holds something else, or others than its owner may read it.
    """
    lines, mode = _read_lines(path)
    keys = tuple(_parse_line(path, line, PrivateKey) for line in lines)
    if not keys:
        raise UsageError(f"there is no private key in {path}")
    if stat.S_ISREG(mode) and mode & 0o077:
        raise UsageError(f"others may read the private key in {path}: chmod 600 {path}")
    return keys


def read_recipients(text: str) -> tuple[Recipient, ...]:
    """Return the recipient that `text` is, or those in the file of that name.

    A private key in the file stands for its recipient.

    Raises:
        UsageError: it is neither, or the file holds something else.
    """
    if text.startswith(_RECIPIENT_PREFIX) and not Path(text).exists():
        try:
            return (Recipient.parse(text),)
        except ValueError as error:
            raise UsageError(f"{text} is no recipient: {error}") from error
    lines, _ = _read_lines(text)
    recipients = tuple(
        _parse_line(text, line, PrivateKey).recipient
        if line.startswith(_PRIVATE_PREFIX)
        else _parse_line(text, line, Recipient)
        for line in lines
    )
    if not recipients:
        raise UsageError(f"there is no recipient in {text}")
    return recipients


def _parse_line(path: str | os.PathLike[str], line: str, kind: type[K]) -> K:
    try:
        return kind.parse(line)
    except ValueError as error:
        # The line itself is not shown: it may be a private key but for a typing error.
        name = "private key" if kind is PrivateKey else "recipient"
        raise UsageError(f"a line of {path} is no {name}: {error}") from error


def _read_lines(path: str | os.PathLike[str]) -> tuple[list[str], int]:
    """Return the lines of a key file that say something, and its mode."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read the keys in {path}: {error.strerror}") from error
    lines = (line.strip() for line in data.decode("ascii", "replace").splitlines())
    return [line for line in lines if line and not line.startswith("#")], mode


def write_private_key(path: str | os.PathLike[str], key: PrivateKey) -> None:
    """Write a key into a new file that only its owner may read, mode 0600.

    Raises:
        UsageError: it exists, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    text = f"# A private key of ckpt: it opens what was encrypted to\n# {key.recipient}\n{key}\n"
    try:
        with open(os.open(path, flags, 0o600), "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"cannot write the key to {path}: {error.strerror}") from error


def distinct(recipients: Iterable[Recipient]) -> tuple[Recipient, ...]:
    """Return each recipient once, in the order in which they came.

    Raises:
        UsageError: they are too many.
    """
    each = tuple(dict.fromkeys(recipients))
    if len(each) > MAX_RECIPIENTS:
        raise UsageError(f"an image has at most {MAX_RECIPIENTS} recipients, not {len(each)}")
    return each
