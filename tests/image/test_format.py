"""The header and the manifest as bytes; what is in them is in test_chain and test_hostile."""

import hashlib
import re
import subprocess
import sys

import attrs
import pytest

from ckpt.errors import ImageCorrupt, ImageVersion
from ckpt.image.codec import unpack
from ckpt.image.format import (
    FORMAT_VERSION,
    MAX_GENERATION,
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_PAGE_FILES,
    SEALED_VERSION,
    Fate,
    Kind,
    Manifest,
    Parent,
    decode_manifest,
    encode_manifest,
    generation_name,
    parse_generation_name,
)
from ckpt.image.header import decode_header, encode_header
from ckpt.image.pages import (
    FRAME_BYTES,
    MAX_FRAME_BYTES,
    MAX_PAGE_SIZE,
    MIN_PAGE_SIZE,
    SHRINK_DENOMINATOR,
    SHRINK_NUMERATOR,
    Encoding,
)
from ckpt.image.runs import COUNT_BYTES, RUN_BYTES
from tests.image.chain_model import (
    CHAIN_ID,
    PAGE,
    add_generation,
    data,
    file,
    new_chain,
    parent,
    soft_page,
    zero,
)
from tests.image.make_golden import IMAGES

MANIFEST = Manifest(
    format_version="1.0",
    chain_id=CHAIN_ID,
    generation=3,
    kind=Kind.DELTA,
    parent=Parent(1, bytes(range(32))),
    created_s=5.0,
    page_size=PAGE,
    tracker="softdirty",
    reason="",
    freeze_ms=1.0,
    wall_ms=2.0,
    host={},
    records={},
    spaces={},
    page_files=(),
    replaces=(bytes(32),),
)


def test_the_manifest_has_the_specified_frame():
    content, digest = encode_manifest(MANIFEST)
    assert content[:8] == b"CKPTGEN\n"
    assert content[8:16] == bytes([1, 0, 0, 0, 0, 0, 0, 0])
    assert int.from_bytes(content[16:24], "little") == len(content) - 24 - 32
    assert content[-32:] == digest == hashlib.blake2b(content[:-32], digest_size=32).digest()


def test_the_manifest_comes_back():
    content, digest = encode_manifest(MANIFEST)
    assert decode_manifest(content, "there") == attrs.evolve(MANIFEST, digest=digest)


def test_fields_of_a_later_minor_version_survive_being_written_again():
    later = attrs.evolve(MANIFEST, format_version="1.7", extra={"signature": b"xyz", "n": [1]})
    content, _ = encode_manifest(later)
    read = decode_manifest(content, "there")
    assert (read.format_version, read.extra) == ("1.7", {"signature": b"xyz", "n": [1]})
    assert encode_manifest(read)[0] == content


def test_extra_fields_cannot_shadow_known_ones():
    content, _ = encode_manifest(attrs.evolve(MANIFEST, extra={"tracker": "other"}))
    assert decode_manifest(content, "there").tracker == "softdirty"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chain_id": "../.."}, "32 hex digits"),
        ({"generation": 1_000_000}, "generation number"),
        ({"kind": Kind.FULL}, "must not"),
        ({"parent": None}, "must name a parent"),
        ({"parent": Parent(3, bytes(32))}, "not older"),
        ({"parent": Parent(1, bytes(31))}, "digest has the wrong length"),
        ({"page_size": 4097}, "page size 4097"),
        ({"page_size": 2048}, "page size 2048"),
        ({"page_size": 1 << 17}, "page size"),
        ({"freeze_ms": float("nan")}, "no number"),
        ({"wall_ms": -1.0}, "negative"),
        ({"created_s": 1e300}, "no year"),
    ],
)
def test_values_out_of_range_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        encode_manifest(attrs.evolve(MANIFEST, **changes))


def test_the_header_comes_back_and_later_lines_are_ignored():
    header = encode_header(CHAIN_ID)
    assert decode_header(header, "CKPT") == (CHAIN_ID, ())
    assert decode_header(header + b"compression lz5\n", "CKPT") == (CHAIN_ID, ())
    assert decode_header(header.replace(b"1.0", b"1.31"), "CKPT") == (CHAIN_ID, ())


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"ckpt image ", b""), (b"1.0", b"1"), (b"1.0", b"x"), (b"chain ", b""), (b"ff\n", b"\n")],
)
def test_a_damaged_header_is_told(old, new):
    with pytest.raises(ImageCorrupt, match=r"^CKPT is damaged"):
        decode_header(encode_header(CHAIN_ID).replace(old, new), "CKPT")


@pytest.mark.parametrize("version", [b"0.9", b"3.0", b"10.1"])
def test_another_major_version_is_told(version):
    with pytest.raises(
        ImageVersion, match=f"has format {version.decode()}, this ckpt reads 1.x and 2.x"
    ):
        decode_header(encode_header(CHAIN_ID).replace(b"1.0", version), "CKPT")


@pytest.mark.parametrize("number", [0, 1, 123456, 999_999])
def test_generation_names_come_back(number):
    assert parse_generation_name(generation_name(number)) == number


def test_the_image_layer_imports_nothing_heavy_and_nothing_above():
    code = (
        "import sys, ckpt.image.verify, ckpt.image.chain;"
        "print(*sorted({name for name in sys.modules if name.partition('.')[0] in"
        " ('cattrs', 'numpy', 'rich', 'click', 'elftools', 'logging')"
        " or name.startswith('ckpt.')}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    below = ("ckpt.image", "ckpt.fault", "ckpt.errors", "ckpt.units")
    assert "ckpt.image.chain" in loaded
    assert [name for name in loaded if not name.startswith(below)] == []


# The specification is read by people who write other readers: what it says must be what is so.


def specification():
    return (IMAGES / "FORMAT.md").read_text()


def test_the_specification_names_every_field_of_the_body():
    content, _ = encode_manifest(MANIFEST)
    fields = set(unpack(content[24:-32]))
    body_table = specification().partition("The body is one msgpack map")[2]
    body_table = body_table.partition("\n#")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", body_table, re.MULTILINE)) == fields


def test_the_specification_has_the_numbers_of_the_code():
    text = specification()
    assert f"# The image format, versions {FORMAT_VERSION} and {SEALED_VERSION}\n" in text
    for value, name in (
        *((fate.value, f"`{fate.name}`") for fate in Fate),
        *((encoding.value, encoding.name.lower()) for encoding in Encoding),
    ):
        assert f"| {value} | {name} |" in text
    assert f"exactly {COUNT_BYTES} + {RUN_BYTES} n bytes" in text
    assert f"exactly {FRAME_BYTES} n bytes" in text
    assert f"at most {MAX_MANIFEST_BYTES >> 20} MiB" in text
    assert f"| up to {MAX_FRAME_BYTES >> 20} MiB of whole pages" in text
    assert f"from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE};" in text
    assert f"at most {MAX_GENERATION} " in text
    assert f"at most {MAX_PAGE_FILES} " in text
    assert f"at most {MAX_HEADER_BYTES} bytes" in text
    assert f"{SHRINK_NUMERATOR}/{SHRINK_DENOMINATOR} of its size" in text


def test_the_drawn_delta_is_what_the_code_makes_of_it(tmp_path):
    """The worked picture of the specification, page by page."""
    a, b, c, d, e, f, g, new_b, new_e, h = (soft_page(ord(name)) for name in "ABCDEFGbeh")
    history = [
        (
            None,
            [data(0, a, b, c, d), data(6, e), zero(7, 1), data(8, f, g), file(10, 2)],
        ),
        (
            0,
            [
                *(parent(0, 1), data(1, new_b), parent(2, 1), zero(3, 1)),
                *(data(6, new_e), parent(7, 1), data(10, h), parent(11, 1)),
            ],
        ),
    ]
    chain = new_chain(tmp_path / "drawn")
    for above, runs in history:
        add_generation(chain, {"mm": runs}, above)
    first = chain.manifest(0).spaces["mm"]
    second = chain.manifest(1).spaces["mm"]
    assert [start // PAGE for start in first.starts] == [0, 6, 7, 8, 10]
    assert (list(first.n_pages), list(first.sources)) == ([4, 1, 1, 2, 2], [0, 4, 0, 5, 0])
    assert list(first.fates) == [Fate.DATA, Fate.DATA, Fate.ZERO, Fate.DATA, Fate.FILE]
    assert [start // PAGE for start in second.starts] == [0, 1, 2, 3, 6, 7, 10, 11]
    assert list(second.sources) == [0, 0, 0, 0, 1, 0, 2, 0]
    told = {}
    for run in chain.resolve(1, "mm"):
        assert run.n_pages == 1
        told[run.start // PAGE] = (run.fate.name, run.generation, run.source)
    assert told == {
        0: ("DATA", 0, 0),
        1: ("DATA", 1, 0),
        2: ("DATA", 0, 2),
        3: ("ZERO", 1, 0),
        6: ("DATA", 1, 1),
        7: ("ZERO", 0, 0),
        10: ("DATA", 1, 2),
        11: ("FILE", 0, 0),
    }
