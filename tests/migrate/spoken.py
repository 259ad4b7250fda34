"""Messages that only tests say; their numbers are at the end, where no real one will be."""

import attrs

from ckpt.errors import Finding
from ckpt.image.pages import EncodedFrame, Encoding
from ckpt.migrate.message import FrameMessage, Message, message


@message(65000)
@attrs.frozen
class Word(Message):
    text: str
    count: int = 0


@message(65001)
@attrs.frozen
class Pages(FrameMessage):
    first_page: int


@message(65002, max_field_bytes=1 << 23)
@attrs.frozen
class Large(Message):
    data: bytes


@message(65003)
@attrs.frozen
class Everything(Message):
    text: str
    data: bytes
    number: int
    ratio: float
    yes: bool
    maybe: int | None
    some: tuple[int, ...]
    pair: tuple[int, str]
    named: dict[str, int]
    findings: tuple[Finding, ...]


def raw_frame(data):
    import zlib

    return EncodedFrame(data, Encoding.RAW, zlib.crc32(data))
