"""Good bytes for each target: of the golden chains, of a real dump, and every message once."""

import typing
from pathlib import Path

import attrs

from ckpt.image.chain import Chain
from ckpt.image.codec import pack, unpack
from ckpt.image.format import DIGEST_BYTES, PREAMBLE
from ckpt.image.pages import Encoding, encode_frame
from ckpt.migrate.frames import HEADER_BYTES
from ckpt.migrate.message import FrameMessage, encode
from tests.fuzz.targets import FILES, TARGETS, TYPES, packed
from tests.image.chain_model import KEY, PAGE, hard_page, soft_page
from tests.image.make_golden import IMAGES

FOUND = Path(__file__).with_name("found")
GOLDEN = IMAGES / "golden"
PLAIN, SEALED = GOLDEN / "format-1.0", GOLDEN / "format-2.0"
PLAIN_VALUES = {int: 4096, str: "mm-1", bytes: packed(0, 4096, 8192), bool: True, float: 1.5}


def _manifests(path):
    return [file.read_bytes() for file in sorted(path.glob("gen-*/manifest"))]


def _bodies(path):
    return [whole[PREAMBLE.size : -DIGEST_BYTES] for whole in _manifests(path)]


def _replacing():
    """Return the body of a manifest with all that may also be left out."""
    body = unpack(_bodies(PLAIN)[1])
    return pack({**body, "replaces": [bytes(DIGEST_BYTES)] * 2})


def _run_tables():
    chain = Chain.open(PLAIN)
    tables = [t for n in chain.generations() for t in chain.manifest(n).spaces.values()]
    return [table.pack() + bytes([9]) for table in tables]


def _frame_tables():
    chain = Chain.open(PLAIN)
    files = [file for n in chain.generations() for file in chain.manifest(n).page_files]
    return [file.frames.pack() for file in files]


def _frames():
    soft, hard = soft_page(1) * 3, hard_page(2)
    return [
        bytes([len(raw) // PAGE - 1, one.encoding]) + bytes(one.stored)
        for raw in (soft, hard, soft + hard)
        for one in (encode_frame(memoryview(raw), 3), encode_frame(memoryview(raw), None))
    ]


def _value(kind):
    """Return something of this type."""
    if kind in PLAIN_VALUES:
        return PLAIN_VALUES[kind]
    if typing.get_origin(kind) is tuple:
        return (_value(typing.get_args(kind)[0]),) * 2
    return _instance(kind)


def _instance(kind):
    fields = [one for one in attrs.fields(attrs.resolve_types(kind)) if one.name != "frame"]
    return kind(**{one.name: _value(one.type) for one in fields})


def _one_of(kind):
    made = _instance(kind)
    if not issubclass(kind, FrameMessage):
        return made
    return attrs.evolve(made, frame=encode_frame(memoryview(soft_page(1)), 3))


def _messages():
    """Return each as it travels."""
    said = []
    for kind in TYPES:
        head, frame = encode(_one_of(kind))
        said.append(head + (bytes(frame.stored) if frame else b""))
    return said


def _words():
    return [bytes([number, 9, Encoding.RAW]) + _fields(kind) for number, kind in enumerate(TYPES)]


def _fields(kind):
    return encode(_one_of(kind))[0][HEADER_BYTES:]


def _parts():
    """Return the files of a chain, manifests without what the target puts around them."""
    parts = []
    for number, name in enumerate(FILES):
        whole = (PLAIN / name).read_bytes()
        if name.endswith("manifest"):
            whole = whole[PREAMBLE.size : -DIGEST_BYTES]
        parts.append(bytes([number]) + whole)
    return parts


def _made():
    headers = [(path / "CKPT").read_bytes() for path in (PLAIN, SEALED)]
    said = _messages()
    return {
        "header": headers,
        "key": [str(KEY).encode(), str(KEY.recipient).encode()],
        "manifest": [*_bodies(PLAIN), _replacing()],
        "sealed": _bodies(SEALED),
        "whole_manifest": _manifests(PLAIN) + _manifests(SEALED),
        "runs": _run_tables(),
        "frames": _frame_tables(),
        "frame": _frames(),
        "spans": [packed(4096, 8192, 8192, 40960)],
        "stream": [*said, b"".join(said)],
        "words": _words(),
        "chain": _parts(),
    }


def seeds():
    """Return the bytes to begin with, by target; those that were found behind those made here."""
    made = _made()
    return {
        target: made.get(target, [])
        + [file.read_bytes() for file in sorted((FOUND / target).glob("*"))]
        for target in TARGETS
    }
