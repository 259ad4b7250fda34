"""Makes images/golden/ and images/broken/.

    python -m tests.image.make_golden golden    new directories for the present format versions;
                                                does not touch one that exists
    python -m tests.image.make_golden broken    all of images/broken/, afresh

A golden chain is never edited: it stands for the images that people have. A change of format adds a
directory beside the old ones, and the reader keeps reading all of them.
"""

import shutil
import sys
import zlib
from pathlib import Path

from ckpt.image.chain import Chain
from ckpt.image.codec import pack, unpack
from ckpt.image.format import (
    DIGEST_BYTES,
    FORMAT_VERSION,
    PREAMBLE,
    SEALED_VERSION,
    digest_of,
)
from ckpt.image.header import encode_header
from ckpt.image.pages import FrameTable
from ckpt.image.runs import RunTable
from ckpt.image.store import Store
from ckpt.image.writer import WriterOptions
from tests.image.chain_model import (
    CHAIN_ID,
    KEY,
    PAGE,
    add_generation,
    data,
    file,
    hard_page,
    parent,
    soft_page,
    zero,
)

IMAGES = Path(__file__).parents[2] / "images"
GOLDEN = {
    IMAGES / "golden" / f"format-{FORMAT_VERSION}": (),
    IMAGES / "golden" / f"format-{SEALED_VERSION}": (KEY.recipient,),
}
"""For each, to whom it is encrypted."""
BROKEN = IMAGES / "broken"
OTHER_CHAIN_ID = "ffeeddccbbaa99887766554433221100"
CREATED_S = 1_700_000_000.5


def make_history(hard):
    """Return, by generation number, the parent and the spaces; `hard` makes some of the pages."""
    return [
        (
            None,
            {
                "mm-1": [
                    data(0x400, soft_page(1), soft_page(2), hard(3)),
                    zero(0x403, 2),
                    file(0x405, 1),
                    data(0x500, hard(4), hard(5)),
                ],
                "shm-1": [data(0, soft_page(6), soft_page(7))],
            },
        ),
        (
            0,
            {
                "mm-1": [
                    parent(0x400, 1),
                    data(0x401, soft_page(11)),
                    parent(0x402, 2),
                    data(0x404, hard(12)),
                    parent(0x405, 1),
                    parent(0x500, 2),
                    zero(0x502, 1),
                ],
                "shm-1": [parent(0, 2)],
            },
        ),
        (
            1,
            {
                "mm-1": [
                    data(0x400, soft_page(21)),
                    parent(0x401, 4),
                    data(0x405, soft_page(22)),
                    zero(0x500, 1),
                    parent(0x501, 2),
                    data(0x7FF0, soft_page(23)),
                ],
            },
        ),
    ]


HISTORY = make_history(hard_page)
"""What the golden chain must read back as."""

SMALL_HISTORY = make_history(soft_page)
"""The same with pages that all compress well: there are many broken chains."""


def make_chain(
    path, chain_id=CHAIN_ID, history=HISTORY, reason="the chain begins here", recipients=()
):
    """Write a chain without anything random in it, but for the keys of one that is encrypted."""
    store = Store(path)
    store.make_root()
    store.write_file("CKPT", data=encode_header(chain_id, recipients))
    chain = Chain.open(path)
    for number, (above, spaces) in enumerate(history):
        add_generation(
            chain,
            spaces,
            above,
            # One thread and small files: two page files, and frames of both encodings.
            options=WriterOptions(threads=1, page_file_bytes=2 * PAGE),
            after_run=lambda writer: writer.flush(),
            created_s=CREATED_S + number,
            freeze_ms=1.5,
            wall_ms=20.25,
            tracker="full" if above is None else "softdirty",
            reason=reason if above is None else "",
            host={"machine": "x86_64"},
            extra={"later": ["a field that format 1.0 does not know", number]},
        )
    (path / "lock").unlink(missing_ok=True)
    return path


def reseal(manifest, change):
    """Change the decoded body of a manifest and close it with a right digest."""
    whole = manifest.read_bytes()
    preamble = list(PREAMBLE.unpack_from(whole))
    body = unpack(whole[PREAMBLE.size : -DIGEST_BYTES])
    change(body, preamble)
    packed = pack(body)
    preamble[-1] = len(packed)
    front = PREAMBLE.pack(*preamble) + packed
    manifest.write_bytes(front + digest_of(front))


def change_table(body, space, change):
    table = RunTable.unpack(body["spaces"][space], PAGE)
    change(table)
    body["spaces"][space] = table.pack()


def change_frames(body, change):
    frames = FrameTable.unpack(body["page_files"][0]["frames"])
    change(frames)
    body["page_files"][0]["frames"] = frames.pack()


def flip_bit(path, offset, bit=3):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def cut(path, n_bytes):
    path.write_bytes(path.read_bytes()[:-n_bytes])


def swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def replace_generation(path, number, **how):
    """Put a generation from a chain made another way in the place of one."""
    other = make_chain(path.with_name("other"), history=SMALL_HISTORY, **how)
    name = f"gen-{number:06d}"
    shutil.rmtree(path / name)
    (other / name).rename(path / name)
    shutil.rmtree(other)


def link_page_file(path):
    pages = path / "gen-000002" / "pages-0"
    pages.rename(pages.with_name("elsewhere"))
    pages.symlink_to("elsewhere")


def announce_big_frame(path):
    """Let a zstd frame, right in all checksums, say that it holds 1 GiB."""

    pages = path / "gen-000002" / "pages-0"
    stored = pages.read_bytes()
    # RFC 8878: magic, descriptor with single segment and a 4 byte content size, that size.
    huge = stored[:4] + bytes([0b1010_0100]) + (1 << 30).to_bytes(4, "little")
    size = FrameTable.unpack(_body(path, 2)["page_files"][0]["frames"]).stored_bytes[0]
    pages.write_bytes(huge + stored[len(huge) :])

    def change(body, _preamble):
        def set_checksum(frames):
            frames.checksums[0] = zlib.crc32(pages.read_bytes()[:size])

        change_frames(body, set_checksum)

    reseal(path / "gen-000002" / "manifest", change)


def _body(path, number):
    whole = (path / f"gen-{number:06d}" / "manifest").read_bytes()
    return unpack(whole[PREAMBLE.size : -DIGEST_BYTES])


def with_body(number, change):
    """Make a defect out of a change of the decoded body of one manifest."""

    def apply(path):
        reseal(path / f"gen-{number:06d}" / "manifest", lambda body, _: change(body))

    return apply


def with_column(number, space, column, index, value):
    def change(table):
        getattr(table, column)[index] = value

    return with_body(number, lambda body: change_table(body, space, change))


def with_frame_column(number, column, index, value):
    def change(frames):
        getattr(frames, column)[index] = value

    return with_body(number, lambda body: change_frames(body, change))


DEFECTS = {
    "bit-flip-in-frame": lambda p: flip_bit(p / "gen-000000/pages-0", 30),
    "bit-flip-in-manifest": lambda p: flip_bit(p / "gen-000001/manifest", 200),
    "bit-flip-in-digest": lambda p: flip_bit(p / "gen-000001/manifest", -1),
    "truncated-page-file": lambda p: cut(p / "gen-000001/pages-0", 1),
    "truncated-manifest": lambda p: cut(p / "gen-000002/manifest", 40),
    "page-file-too-long": lambda p: (p / "gen-000002/pages-0").open("ab").write(b"more"),
    "missing-page-file": lambda p: (p / "gen-000000/pages-0").unlink(),
    "missing-manifest": lambda p: (p / "gen-000001/manifest").unlink(),
    "missing-parent": lambda p: shutil.rmtree(p / "gen-000000"),
    "missing-header": lambda p: (p / "CKPT").unlink(),
    "damaged-header": lambda p: flip_bit(p / "CKPT", 20),
    "newer-major-version": lambda p: (p / "CKPT").write_bytes(
        encode_header(CHAIN_ID).replace(FORMAT_VERSION.encode(), b"3.0")
    ),
    "newer-major-manifest": lambda p: reseal(
        p / "gen-000002/manifest", lambda _, preamble: preamble.__setitem__(1, 3)
    ),
    "parent-digest-mismatch": lambda p: replace_generation(p, 0, reason="another beginning"),
    "other-chain": lambda p: replace_generation(p, 2, chain_id=OTHER_CHAIN_ID),
    "swapped-generations": lambda p: swap(p / "gen-000001", p / "gen-000002"),
    "parent-not-older": with_body(1, lambda body: body["parent"].update(generation=1)),
    "delta-without-parent": with_body(1, lambda body: body.update(parent=None)),
    "full-with-parent-run": with_column(0, "mm-1", "fates", 1, 0),
    "overlapping-runs": with_column(2, "mm-1", "n_pages", 1, 5),
    "unordered-runs": with_column(2, "mm-1", "starts", 1, 0x1000),
    "unaligned-run": with_column(2, "mm-1", "starts", 5, 0x7FF0001),
    "run-past-the-end": with_column(2, "mm-1", "n_pages", 5, 1 << 60),
    "empty-run": with_column(2, "mm-1", "n_pages", 1, 0),
    "unknown-fate": with_column(2, "mm-1", "fates", 1, 9),
    "source-out-of-range": with_column(2, "mm-1", "sources", 0, 3),
    "parent-lacks-page": with_column(2, "mm-1", "n_pages", 4, 3),
    "unknown-encoding": with_frame_column(2, "encodings", 0, 7),
    "wrong-encoding": with_frame_column(2, "encodings", 0, 0),
    "frame-too-big": with_frame_column(2, "n_pages", 0, 257),
    "frame-announces-too-much": announce_big_frame,
    "run-table-cut-short": with_body(
        1, lambda body: body["spaces"].update({"mm-1": body["spaces"]["mm-1"][:-1]})
    ),
    "page-size-of-zero": with_body(0, lambda body: body.update(page_size=0)),
    "field-of-wrong-type": with_body(2, lambda body: body.update(tracker=5)),
    "field-missing": with_body(2, lambda body: body.pop("records")),
    "page-file-is-a-link": link_page_file,
}
"""By name: what is done to a good chain."""


def make_broken(root):
    for name, spoil in DEFECTS.items():
        path = make_chain(root / name, history=SMALL_HISTORY)
        spoil(path)


def main(arguments):
    if arguments == ["golden"]:
        for path, recipients in GOLDEN.items():
            if not path.exists():
                make_chain(path, recipients=recipients)
    elif arguments == ["broken"]:
        shutil.rmtree(BROKEN, ignore_errors=True)
        BROKEN.mkdir()
        make_broken(BROKEN)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
