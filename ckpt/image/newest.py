"""The file `newest` of a chain, by which a newest generation that was taken away is missed.

Older ones are missed by what is based on them. Nothing is based on the newest: without a note of
its number the one before it would pass for it. The note is written behind each commit, so it may
lag behind by those that a kill or a full disk has kept from it, and the next commit puts that
right. Chains of older versions have none. Neighbours: `chain` asks it for the newest and for the
next number, `writer` and whoever else brings generations write it.
"""

import hashlib
import re

from ckpt.errors import ChainBroken, ImageCorrupt
from ckpt.image.format import (
    MANIFEST_NAME,
    NEWEST_NAME,
    generation_name,
    parse_generation_name,
)
from ckpt.image.store import Store
from ckpt.units import GenerationNo

MAX_NEWEST_BYTES = 256
"""It has always the same length, which is less."""

_SUM_BYTES = 16
_TEXT = re.compile(rb"ckpt newest\nchain ([0-9a-f]{32})\ngeneration ([0-9]{6})\nsum [0-9a-f]{32}\n")


def encode_newest(chain_id: str, number: GenerationNo) -> bytes:
    """Return the content of the file `newest`."""
    text = f"ckpt newest\nchain {chain_id}\ngeneration {number:06}\n".encode("ascii")
    return text + f"sum {hashlib.blake2b(text, digest_size=_SUM_BYTES).hexdigest()}\n".encode()


def decode_newest(data: bytes, path: str) -> tuple[str, GenerationNo]:
    """Return the chain id and the number from the content of the file `newest`.

    Raises:
        ImageCorrupt: it is not exactly what `encode_newest` makes.
    """
    match = _TEXT.fullmatch(data)
    if match is not None:
        chain_id, number = match[1].decode("ascii"), GenerationNo(int(match[2]))
        if encode_newest(chain_id, number) == data:
            return chain_id, number
    raise ImageCorrupt(
        path,
        "it is not the number of a generation and its sum: --at N does without it, and the next"
        " dump writes it anew",
    )


def read_newest(store: Store, chain_id: str) -> GenerationNo | None:
    """Return what was noted as the newest generation; None where nothing was.

    Raises:
        ImageCorrupt: it is damaged.
        ChainBroken: it is another chain's.
        ImageUnusable, ImageUntrusted: it cannot be read, or others can have written it.
    """
    if NEWEST_NAME not in store.read_names():
        return None
    path = str(store.path / NEWEST_NAME)
    data = store.read_file(NEWEST_NAME, max_bytes=MAX_NEWEST_BYTES)
    other_id, number = decode_newest(data, path)
    if other_id != chain_id:
        raise ChainBroken(path, f"it belongs to chain {other_id}, this is chain {chain_id}")
    return number


def write_newest(store: Store, chain_id: str, number: GenerationNo) -> None:
    """Note which generation is the newest, in one step.

    State: inside `Store.lock`; the generation is on the disk, and none has a higher number.

    Raises:
        HostFull, ImageUnusable: it cannot be written; what was noted before still is.
    """
    store.replace_file(NEWEST_NAME, data=encode_newest(chain_id, number))


def present_newest(store: Store) -> GenerationNo | None:
    """Return the highest number that there is, whatever was noted."""
    numbers = map(parse_generation_name, store.read_names())
    return max((number for number in numbers if number is not None), default=None)


def is_noted(store: Store, chain_id: str, number: GenerationNo) -> bool:
    """Tell whether `number`, or a higher one, is noted; a note that is damaged is none."""
    noted = _read_if_good(store, chain_id)
    return noted is not None and noted >= number


def known_newest(store: Store, chain_id: str) -> GenerationNo | None:
    """Return the highest number that there is or was, so that none is given twice.

    Of a note that is damaged or another chain's nothing is known: that keeps nobody from writing.
    """
    known = (_read_if_good(store, chain_id), present_newest(store))
    return max((one for one in known if one is not None), default=None)


def _read_if_good(store: Store, chain_id: str) -> GenerationNo | None:
    try:
        return read_newest(store, chain_id)
    except (ImageCorrupt, ChainBroken):
        return None


def require_newest(store: Store, chain_id: str) -> GenerationNo | None:
    """Return the newest generation; None for a chain that never had one.

    Raises:
        ChainBroken: a newer one was there, and is gone; or the note is another chain's.
        ImageCorrupt, ImageUnusable, ImageUntrusted: see `read_newest`.
    """
    # Read before what is there is listed: a writer may commit in between, and then note it.
    noted = read_newest(store, chain_id)
    present = present_newest(store)
    if noted is None or (present is not None and present >= noted):
        return present
    store.refresh()
    present = present_newest(store)
    if present is not None and present >= noted:
        return present
    raise ChainBroken(
        str(store.path / generation_name(noted) / MANIFEST_NAME),
        f"it was the newest generation, and is gone: put it back, {_describe_left(present)} (if"
        f" it was removed on purpose, remove {store.path / NEWEST_NAME}, too)",
    )


def _describe_left(present: GenerationNo | None) -> str:
    if present is None:
        return "there is no other"
    return f"or take the newest that is left with --at {present}"
