"""Encryption of one generation, with a key of its own: page frames one by one, and the manifest.

    frame 0   frame 1   ...            manifest
    [pages]   [pages]                  [what the chain hangs together by][records]
       |         |   zstd                           |                       |
    [.....]   [...]                                 | authenticated         |
       |         |   AES-256-GCM                    v                       v
    [sealed]  [sealed]  + 28 bytes     [the same, readable              ][sealed]

Each nonce is drawn anew: a generation that is merged with others gets further frames under the same
key, more than once if that was interrupted, and no counter would know. What a frame is (chain,
generation, number, encoding) is authenticated with it, so none can stand for another. All of this
is in images/FORMAT.md, "Encryption". Neighbours: `keys` wraps the generation's key, `pages` calls
on this for each frame, `format` for the manifest.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

import attrs

from ckpt.errors import ImageSealed
from ckpt.image.keys import (
    KEY_BYTES,
    NONCE_BYTES,
    PrivateKey,
    Recipient,
    WrappedKey,
    unwrap,
    wrap,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_FRAME_CONTEXT = struct.Struct("<16sIQB")
"""Chain id, generation, number of the frame, encoding."""
_CONTEXT = struct.Struct("<16sI")
"""Chain id, generation."""


class Seal:
    """The key of one generation; its methods are safe in any thread."""

    def __init__(self, key: bytes, chain_id: str, generation: int) -> None:
        """Use `key` (`KEY_BYTES`), that of this generation of this chain (32 hex digits)."""
        self._key = key
        self._chain = bytes.fromhex(chain_id)
        self._generation = generation

    @cached_property
    def _frames(self) -> "AESGCM":
        return _cipher(self._key, b"ckpt image 2: frames")

    @cached_property
    def _records(self) -> "AESGCM":
        return _cipher(self._key, b"ckpt image 2: records")

    def seal_frame(self, stored: bytes | memoryview, number: int, encoding: int) -> bytes:
        """Encrypt a frame as it would be stored; `encoding` is that of the sealed one."""
        context = _FRAME_CONTEXT.pack(self._chain, self._generation, number, encoding)
        return _seal(self._frames, stored, context)

    def open_frame(self, stored: bytes | memoryview, number: int, encoding: int) -> bytes:
        """Undo `seal_frame`.

        Raises:
            ValueError: it is not what was sealed as that frame.
        """
        context = _FRAME_CONTEXT.pack(self._chain, self._generation, number, encoding)
        return _open(self._frames, stored, context)

    def seal_records(self, records: bytes, beside: bytes) -> bytes:
        """Encrypt the secret part of the manifest, bound to the part `beside` it."""
        return _seal(self._records, records, beside)

    def open_records(self, sealed: bytes, beside: bytes) -> bytes:
        """Undo `seal_records`.

        Raises:
            ValueError: one of the two parts was altered.
        """
        return _open(self._records, sealed, beside)


def _cipher(key: bytes, purpose: bytes) -> "AESGCM":
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

    return AESGCM(HKDFExpand(SHA256(), KEY_BYTES, purpose).derive(key))


def _seal(cipher: "AESGCM", content: bytes | memoryview, context: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, content, context)


def _open(cipher: "AESGCM", sealed: bytes | memoryview, context: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag

    view = memoryview(sealed)
    try:
        return cipher.decrypt(bytes(view[:NONCE_BYTES]), view[NONCE_BYTES:], context)
    except (InvalidTag, ValueError) as error:  # ValueError: too short for a nonce
        raise ValueError("it does not decrypt: altered, or from elsewhere") from error


@attrs.frozen(repr=False)
class Sealed:
    """That a generation is encrypted, and to whom.

    Attributes:
        keys: its key, for each recipient.
        seal: what opens it; None if no private key for it was given.
    """

    keys: tuple[WrappedKey, ...]
    seal: Seal | None


def make_sealed(recipients: Iterable[Recipient], chain_id: str, generation: int) -> Sealed:
    """Make the key of a new generation; never the same again, whatever becomes of the generation.

    Raises:
        ValueError: a recipient is none that anybody can be.
    """
    key = os.urandom(KEY_BYTES)
    what = _CONTEXT.pack(bytes.fromhex(chain_id), generation)
    keys = tuple(wrap(key, recipient, what) for recipient in recipients)
    return Sealed(keys, Seal(key, chain_id, generation))


def open_sealed(
    keys: tuple[WrappedKey, ...], private: Iterable[PrivateKey], chain_id: str, generation: int
) -> Sealed:
    """Open the key of a generation, if one of the private keys is of one of its recipients.

    Raises:
        ValueError: it was altered.
    """
    what = _CONTEXT.pack(bytes.fromhex(chain_id), generation)
    by_recipient = {wrapped.recipient: wrapped for wrapped in keys}
    for one in private:
        wrapped = by_recipient.get(one.recipient)
        if wrapped is not None:
            return Sealed(keys, Seal(unwrap(wrapped, one, what), chain_id, generation))
    return Sealed(keys, None)


class Locked(Mapping[str, object]):
    """Stands for what is encrypted; whoever looks into it is told so."""

    def __init__(self, path: str) -> None:
        """Stand for a part of the file `path`."""
        self._path = path

    def _refuse(self) -> NoReturn:
        raise ImageSealed(self._path, NEEDS_IDENTITY)

    def __getitem__(self, key: str) -> object:
        """Raise `ImageSealed`."""
        self._refuse()

    def __iter__(self) -> Iterator[str]:
        """Raise `ImageSealed`."""
        self._refuse()

    def __len__(self) -> int:
        """Raise `ImageSealed`."""
        self._refuse()


NEEDS_IDENTITY = "it is encrypted: give --identity with the file of the private key"
