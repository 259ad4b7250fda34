"""Lists of address ranges on the wire: pairs of packed u64, ascending and disjoint; pure."""

import mmap
from array import array

from ckpt.tracker.spans import Spans


def pack_spans(spans: Spans) -> bytes:
    """Return spans as they are sent."""
    return array("Q", [address for span in spans for address in span]).tobytes()


def unpack_spans(packed: bytes | bytearray | memoryview) -> Spans:
    """Return what `pack_spans` packed.

    Raises:
        ValueError: it is none of that, or not in order, or not of whole pages.
    """
    if len(packed) % 16:
        raise ValueError("a list of address ranges is cut short")
    flat = array("Q")
    flat.frombytes(bytes(packed))
    spans = list(zip(flat[::2], flat[1::2], strict=True))
    before = 0
    for start, end in spans:
        if start < before or end <= start or (start | end) % mmap.PAGESIZE:
            raise ValueError("a list of address ranges is out of order")
        before = end
    return spans
