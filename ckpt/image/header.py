"""The header of a chain, the file `CKPT`: format version, chain id, to whom it is encrypted; pure.

Neighbours: `chain` makes it once and reads it first, `format` has the manifests.
"""

import re
from collections.abc import Iterable

from ckpt.errors import ImageCorrupt, ImageVersion
from ckpt.image.format import (
    CHAIN_ID_PATTERN,
    FORMAT_MAJOR,
    FORMAT_VERSION,
    SEALED_MAJOR,
    SEALED_VERSION,
    SUPPORTED,
)
from ckpt.image.keys import MAX_RECIPIENTS, Recipient

_RECIPIENT = "recipient "
_VERSION = re.compile(r"([0-9]{1,5})\.([0-9]{1,5})", re.ASCII)


def encode_header(chain_id: str, recipients: Iterable[Recipient] = ()) -> bytes:
    """Return the content of the file `CKPT`; with recipients the chain is encrypted to them."""
    lines = [f"{_RECIPIENT}{one}\n" for one in recipients]
    version = SEALED_VERSION if lines else FORMAT_VERSION
    return f"ckpt image {version}\nchain {chain_id}\n{''.join(lines)}".encode("ascii")


def decode_header(data: bytes, path: str) -> tuple[str, tuple[Recipient, ...]]:
    """Return the chain id from the content of the file `CKPT`, and to whom it is encrypted.

    Other lines are ignored.

    Raises:
        ImageCorrupt: it is not such a file.
        ImageVersion: the major version is not ours.
    """
    lines = data.decode("ascii", "replace").split("\n")
    version = lines[0].removeprefix("ckpt image ")
    parsed = _VERSION.fullmatch(version)
    if lines[0] == version or parsed is None:
        raise ImageCorrupt(path, "it does not begin with 'ckpt image' and a version")
    if int(parsed[1]) not in (FORMAT_MAJOR, SEALED_MAJOR):
        raise ImageVersion(path, version, SUPPORTED)
    chain_id = lines[1].removeprefix("chain ") if len(lines) > 2 else ""
    if len(lines) < 3 or lines[1] == chain_id or not CHAIN_ID_PATTERN.fullmatch(chain_id):
        raise ImageCorrupt(path, "its second line is not 'chain' and 32 hex digits")
    if int(parsed[1]) == FORMAT_MAJOR:
        return chain_id, ()
    return chain_id, _decode_recipients(lines[2:-1], path)


def _decode_recipients(lines: list[str], path: str) -> tuple[Recipient, ...]:
    """Return the recipients that a header of an encrypted chain must have."""
    texts = [line.removeprefix(_RECIPIENT) for line in lines if line.startswith(_RECIPIENT)]
    if not 1 <= len(texts) <= MAX_RECIPIENTS:
        raise ImageCorrupt(path, f"it should have 1 to {MAX_RECIPIENTS} recipients")
    try:
        return tuple(map(Recipient.parse, texts))
    except ValueError as error:
        raise ImageCorrupt(path, f"a recipient in it is none: {error}") from error
