"""One function for each decoder of foreign bytes: it returns, or what it raises is a finding.

Digests and checksums are made right here: they keep damage out, and nobody who means harm. So the
fuzzer's bytes are what is behind them. What else must hold is asserted: a decoder takes no more
memory than what it was given justifies, and opens no file but those of its chain.
"""

import atexit
import itertools
import shutil
import sys
import tempfile
import tracemalloc
import zlib
from array import array
from pathlib import Path

from ckpt.engine.records import decode_tree
from ckpt.errors import ImageCorrupt, ImageError, PeerLost, PeerRefused, ProtocolError
from ckpt.image.access import Access
from ckpt.image.chain import Chain
from ckpt.image.codec import unpack
from ckpt.image.format import (
    FORMAT_MAJOR,
    MANIFEST_MAGIC,
    PREAMBLE,
    decode_manifest,
    digest_of,
)
from ckpt.image.header import decode_header, encode_header
from ckpt.image.keys import PrivateKey, Recipient
from ckpt.image.pages import MAX_FRAME_BYTES, FrameIndex, FrameTable, decode_frame
from ckpt.image.runs import RunTable, overlay
from ckpt.image.verify import verify, verify_for
from ckpt.migrate import message, messages
from ckpt.migrate.channel import Channel
from ckpt.migrate.frames import HEADER_BYTES, Header
from ckpt.migrate.message import FrameMessage
from ckpt.migrate.spans import pack_spans, unpack_spans
from tests.image.chain_model import KEY, PAGE
from tests.image.make_golden import SMALL_HISTORY, make_chain

PATH = "/images/job/gen-000000/manifest"
TYPES = tuple(
    sorted(
        (
            kind
            for kind in vars(messages).values()
            if isinstance(kind, type)
            and issubclass(kind, message.Message)
            and kind.__module__ == messages.__name__
            and message.find_kind(getattr(kind, "NUMBER", 0)) is kind
        ),
        key=lambda kind: kind.NUMBER,
    )
)


def header(data):
    """The file `CKPT`."""
    try:
        chain_id, recipients = decode_header(data, PATH)
    except ImageError:
        return
    # Other lines, and the minor version, are not kept.
    assert decode_header(encode_header(chain_id, recipients), PATH) == (chain_id, recipients)


def key(data):
    """A line of a file of keys."""
    for kind in (Recipient, PrivateKey):
        try:
            text = data.decode("ascii", "replace")
            assert str(kind.parse(text)) == text
        except ValueError:
            continue


def _manifest_of(body, major=FORMAT_MAJOR):
    front = PREAMBLE.pack(MANIFEST_MAGIC, major, 0, 0, len(body)) + body
    return front + digest_of(front)


def manifest(data):
    """The body of a manifest, and the records in it."""
    try:
        decoded = decode_manifest(_manifest_of(data), PATH)
        decode_tree(decoded, PATH)
    except ImageError:
        return


def sealed(data):
    """The body of a manifest that is encrypted."""
    for private in ((), (KEY,)):
        try:
            decode_tree(decode_manifest(_manifest_of(data, 2), PATH, private), PATH)
        except ImageError:
            continue


def whole_manifest(data):
    """The file `manifest` as it is: nothing is made right."""
    for private in (None, (KEY,)):
        try:
            decode_manifest(data, PATH, private)
        except ImageError:
            continue


def records(data):
    """The records of a manifest, which is right otherwise."""
    try:
        values = unpack(data)
    except ValueError:
        return
    if not isinstance(values, dict):
        return
    try:
        decode_tree(_Records(values), PATH)
    except ImageCorrupt:
        return


class _Records:
    """All that is asked of a manifest for that."""

    def __init__(self, values):
        self.records = values


def runs(data):
    """A run table, and what is laid over a parent by it; the last byte says how many pages."""
    n_pages = data[-1] if data else 0
    try:
        table = RunTable.unpack(data[:-1], PAGE)
        table.validate(n_pages, parent_allowed=True)
    except ValueError:
        return
    assert table.pack() == data[:-1]
    below, _gaps = overlay(table, 1, None)
    overlay(table, 2, below)
    for run in itertools.islice(table, 4):
        assert table.lookup(run.start) == run


def frames(data):
    """A frame table, for a page file of the size that it says itself; every page is located."""
    try:
        table = FrameTable.unpack(data)
        table.validate(PAGE, sum(table.stored_bytes))
    except ValueError:
        return
    index = FrameIndex([table, table])
    for page in range(0, index.n_stream_pages, max(1, index.n_stream_pages // 50)):
        place = index.locate(page)
        assert place.first_page <= page < place.first_page + place.n_pages
        assert place.stored_bytes <= MAX_FRAME_BYTES


def frame(data):
    """A frame: how many pages, how it is encoded, and what is stored."""
    n_bytes = (data[0] + 1) * PAGE if data else PAGE
    try:
        raw = decode_frame(data[2:], data[1] % 5 if len(data) > 1 else 0, n_bytes)
    except ValueError:
        return
    assert len(raw) == n_bytes


def spans(data):
    """A list of ranges on the wire."""
    try:
        assert pack_spans(unpack_spans(data)) == data
    except ValueError:
        return


class _Given:
    """A transport on which just these bytes come."""

    peer = "peer"

    def __init__(self, data):
        self._left = memoryview(data)

    def read_into(self, view, _wait_s):
        n_bytes = min(len(view), len(self._left))
        view[:n_bytes] = self._left[:n_bytes]
        self._left = self._left[n_bytes:]
        return n_bytes

    def fileno(self):
        return -1


def stream(data):
    """What comes on a connection: nothing is made right."""
    channel = Channel(_Given(data))
    try:
        while True:
            channel.receive(*TYPES, place=_place)
    except (ProtocolError, PeerLost, PeerRefused):
        return


def _place(n_bytes):
    assert n_bytes <= MAX_FRAME_BYTES
    return memoryview(bytearray(n_bytes))


def words(data):
    """A message: its type, the length of its frame, its fields; all checksums are right."""
    if len(data) < 3:
        return
    kind, n_frame_bytes = TYPES[data[0] % len(TYPES)], data[1]
    is_carrier = issubclass(kind, FrameMessage)
    fields, stored = data[3:], bytes(n_frame_bytes) if is_carrier else b""
    checksums = zlib.crc32(fields), zlib.crc32(stored)
    encoding = data[2] % 3 if is_carrier else 0
    head = Header(
        kind.NUMBER, encoding, len(fields), checksums[0], len(stored), checksums[1] * is_carrier
    )
    assert len(head.pack()) == HEADER_BYTES
    stream(head.pack() + fields + stored)


FILES = ("CKPT", *(f"gen-{n:06d}/{name}" for n in range(3) for name in ("manifest", "pages-0")))


class _OneChain:
    """A chain on disk, one file of which is replaced for a moment."""

    def __init__(self):
        folder = tempfile.mkdtemp(prefix="ckpt-fuzz-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.path = make_chain(Path(folder) / "chain", history=SMALL_HISTORY)
        self._good = {name: (self.path / name).read_bytes() for name in FILES}
        self._opened = None
        sys.addaudithook(self._look)

    def _look(self, event, arguments):
        if event == "open" and self._opened is not None:
            self._opened.append(arguments[0])

    def read_with(self, name, content):
        """Read all that is there; return which files were opened."""
        (self.path / name).write_bytes(content)
        self._opened = []
        try:
            self._read()
        finally:
            opened, self._opened = self._opened, None
            (self.path / name).write_bytes(self._good[name])
        return opened

    def _read(self):
        try:
            chain = Chain.open(self.path, Access(private=(KEY,)))
            verify(chain, threads=1)
            for number in chain.generations():
                reader = verify_for(chain, number, decode=True, threads=1)
                for space in reader.manifest.spaces:
                    for _ in reader.iter_data(space):
                        pass
        except ImageError:
            return


CODE = frozenset({".py", ".pyc", ".so"})
"""What Python itself opens, where something is imported late."""

_chains = []


def chain(data):
    """A file of a chain, and everything that reads it."""
    if not data:
        return
    if not _chains:
        _chains.append(_OneChain())
    one, name = _chains[0], FILES[data[0] % len(FILES)]
    content = _manifest_of(data[1:]) if name.endswith("manifest") else data[1:]
    strange = [path for path in one.read_with(name, content) if not _is_of(one.path, path)]
    assert strange == []


def _is_of(top, path):
    if isinstance(path, int):
        return True
    path = Path(path)
    if path.suffix in CODE:
        return True
    # The reader opens parts by their names, each below the directory that it has open.
    below = path.relative_to(top) if path.is_relative_to(top) else path
    return not below.is_absolute() and ".." not in below.parts and len(below.parts) <= 2


TARGETS = {
    one.__name__: one
    for one in (
        *(header, key, manifest, sealed, whole_manifest, records, runs, frames, frame),
        *(spans, stream, words, chain),
    )
}

BYTES_PER_BYTE = 300
"""An empty map in a list, say, takes one byte of msgpack and 72 here, twice as it is checked."""
FIXED_BYTES = 6 * MAX_FRAME_BYTES
"""What it may take whatever it is given: frames, and what they are decoded with."""


def run_bounded(target, data):
    """Run a target, and assert that it took memory by what it was given."""
    most = FIXED_BYTES + BYTES_PER_BYTE * len(data)
    if _measure(target, data) > most:
        # The first time includes what was imported for it.
        taken = _measure(target, data)
        assert taken <= most, f"{taken} bytes of memory for {len(data)}"


def _measure(target, data):
    """Run a target; return how many bytes of memory it took at once."""
    tracemalloc.start()
    try:
        TARGETS[target](data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def packed(*numbers):
    return array("Q", numbers).tobytes()
