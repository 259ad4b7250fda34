"""How one message lies on the wire: a header, its fields as msgpack, then at most one page frame.

    offset  size  field
         0     4  magic, b"CKMG"
         4     2  number of the message type
         6     2  encoding of the page frame (`image.pages.Encoding`), 0 without one
         8     4  length of the fields in bytes
        12     4  CRC-32 of the fields
        16     4  length of the page frame in bytes, 0 without one
        20     4  CRC-32 of the page frame, as it was when it was encoded; 0 without one
        24     4  CRC-32 of the 24 bytes before

All little endian. Pure: no socket is known here. The header is judged, by its own checksum and by
the caps of its message type, before a byte is allocated for what it announces. Neighbours:
`message` (types and their fields), `channel` (moves the bytes).
"""

import struct
import zlib
from typing import Self

import attrs

from ckpt.image.pages import MAX_FRAME_BYTES, EncodedFrame

MAGIC = b"CKMG"

_FIELDS = struct.Struct("<4sHHIIII")
_CHECKSUM = struct.Struct("<I")

HEADER_BYTES = _FIELDS.size + _CHECKSUM.size


@attrs.frozen(slots=True)
class Header:
    """What is known of a message before its fields are."""

    number: int
    """Of the message type."""
    encoding: int
    n_field_bytes: int
    field_checksum: int
    n_frame_bytes: int
    frame_checksum: int

    def pack(self) -> bytes:
        """Encode as in the table above."""
        fields = _FIELDS.pack(
            MAGIC,
            self.number,
            self.encoding,
            self.n_field_bytes,
            self.field_checksum,
            self.n_frame_bytes,
            self.frame_checksum,
        )
        return fields + _CHECKSUM.pack(zlib.crc32(fields))

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Self:
        """Decode the `HEADER_BYTES` bytes that `pack` made.

        Raises:
            ValueError: they are something else, or damaged.
        """
        magic, *values = _FIELDS.unpack_from(data)
        if magic != MAGIC:
            raise ValueError("what came is no message of ckpt")
        (checksum,) = _CHECKSUM.unpack_from(data, _FIELDS.size)
        if zlib.crc32(memoryview(data)[: _FIELDS.size]) != checksum:
            raise ValueError("the header of a message is damaged")
        return cls(*values)

    def check_caps(self, max_field_bytes: int, takes_frame: bool) -> None:
        """Compare what is announced with what this type of message may be.

        Raises:
            ValueError: it is too much, or a frame where there is none.
        """
        if self.n_field_bytes > max_field_bytes:
            raise ValueError(
                f"a message {self.number} announces {self.n_field_bytes} bytes of fields,"
                f" {max_field_bytes} are allowed"
            )
        if self.n_frame_bytes > MAX_FRAME_BYTES:
            raise ValueError(
                f"a message {self.number} announces a page frame of {self.n_frame_bytes} bytes,"
                f" {MAX_FRAME_BYTES} are allowed"
            )
        if not takes_frame and (self.n_frame_bytes, self.frame_checksum, self.encoding) != (0,) * 3:
            raise ValueError(f"a message {self.number} announces a page frame, and has none")


def make_header(number: int, fields: bytes, frame: EncodedFrame | None) -> Header:
    """Return the header of a message that is about to be sent."""
    return Header(
        number=number,
        encoding=0 if frame is None else int(frame.encoding),
        n_field_bytes=len(fields),
        field_checksum=zlib.crc32(fields),
        n_frame_bytes=0 if frame is None else len(frame.stored),
        frame_checksum=0 if frame is None else frame.checksum,
    )
