"""Whatever an image holds, reading it ends in its pages or in an `ImageError`, and in no other."""

import os
import shutil
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckpt.errors import ImageError
from ckpt.image.chain import Chain
from ckpt.image.format import FORMAT_MAJOR, MANIFEST_MAGIC, PREAMBLE, digest_of
from ckpt.image.pages import FrameTable
from ckpt.image.verify import verify, verify_for
from ckpt.units import AddrRange
from tests.image.make_golden import SMALL_HISTORY, make_chain, reseal

FILES = [
    "CKPT",
    *(f"gen-{n:06d}/{name}" for n in range(3) for name in ("manifest", "pages-0")),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_chain(tmp_path_factory.mktemp("hostile") / "chain", history=SMALL_HISTORY)


class Restored:
    """Gives a file its content back, so that each example starts from the same chain."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        self.content = self.file.read_bytes()
        return self.content

    def __exit__(self, *_):
        self.file.write_bytes(self.content)


def read_everything(path):
    """Read what there is by every way in; return whether nothing was found wrong."""
    try:
        chain = Chain.open(path)
        findings = verify(chain)
        for number in chain.generations():
            reader = verify_for(chain, number, decode=True)
            for space in reader.manifest.spaces:
                runs = reader.resolve(space)
                list(reader.iter_data(space))
                for run in list(runs)[:4]:
                    reader.read(space, AddrRange(run.start, run.start + 1))
    except ImageError:
        return False
    return not findings


def test_the_chain_is_good_to_begin_with(path):
    assert read_everything(path)


@given(file=st.sampled_from(FILES), content=st.binary(max_size=300))
def test_any_bytes(path, file, content):
    with Restored(path / file) as good:
        (path / file).write_bytes(content)
        assert read_everything(path) == (content == good)


@given(data=st.data(), file=st.sampled_from(FILES))
def test_a_flipped_bit_is_never_missed(path, data, file):
    with Restored(path / file) as good:
        bit = data.draw(st.integers(0, len(good) * 8 - 1))
        spoilt = bytearray(good)
        spoilt[bit // 8] ^= 1 << bit % 8
        (path / file).write_bytes(spoilt)
        # The one part of the header that may differ without harm is the minor version.
        harmless = (
            file == "CKPT"
            and bit // 8 == good.index(b".0") + 1
            and spoilt[bit // 8] in range(48, 58)
        )
        assert read_everything(path) == harmless


@given(data=st.data(), file=st.sampled_from(FILES))
def test_bytes_cut_out_put_in_or_written_over(path, data, file):
    with Restored(path / file) as good:
        start = data.draw(st.integers(0, len(good)))
        end = data.draw(st.integers(start, len(good)))
        content = good[:start] + data.draw(st.binary(max_size=40)) + good[end:]
        (path / file).write_bytes(content)
        if file != "CKPT":
            assert read_everything(path) == (content == good)
        else:
            read_everything(path)


def seal(body, major=FORMAT_MAJOR):
    front = PREAMBLE.pack(MANIFEST_MAGIC, major, 0, 0, len(body)) + body
    return front + digest_of(front)


@given(body=st.binary(max_size=200))
@example(body=b"\xdd\x7f\xff\xff\xff")
@example(body=b"\xdf\x7f\xff\xff\xff")
@example(body=b"\x91" * 2000)
def test_any_body_with_a_right_digest(path, body):
    with Restored(path / FILES[1]):
        (path / FILES[1]).write_bytes(seal(body))
        assert not read_everything(path)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = [
    "chain",
    "generation",
    "kind",
    "parent",
    "created_s",
    "page_size",
    "tracker",
    "reason",
    "freeze_ms",
    "wall_ms",
    "host",
    "records",
    "spaces",
    "page_files",
]


@given(
    manifest=st.sampled_from([name for name in FILES if name.endswith("manifest")]),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3),
)
def test_any_value_in_any_field(path, manifest, changes):
    with Restored(path / manifest):
        reseal(path / manifest, lambda body, _: body.update(changes))
        read_everything(path)


@given(
    packed=st.lists(st.integers(0, 2**64 - 1), max_size=9),
    fates=st.binary(max_size=3),
    near=st.booleans(),
)
def test_any_run_table(path, packed, fates, near):
    """Columns of the right length, so that their values are what is looked at."""
    n = len(fates)
    packed = (packed + [0] * 3 * n)[: 3 * n]
    if near:
        packed = [value % 0x600 * (0x1000 if at < n else 1) for at, value in enumerate(packed)]
    columns = b"".join(value.to_bytes(8, "little") for value in packed)
    with Restored(path / FILES[5]):
        table = n.to_bytes(8, "little") + columns + fates
        reseal(path / FILES[5], lambda body, _: body["spaces"].update({"mm-1": table}))
        read_everything(path)


@given(data=st.data(), content=st.binary(min_size=1, max_size=60), n_pages=st.integers(0, 300))
def test_any_frame_with_a_right_checksum(path, data, content, n_pages):
    """The checksum is no secret, so the decoder sees what an enemy wants it to see."""
    manifest, pages = path / FILES[5], path / FILES[6]
    with Restored(manifest), Restored(pages) as good:
        stored = data.draw(st.sampled_from([content, good[:6] + content, good[:9] + content]))
        frames = FrameTable()
        frames.n_pages.append(n_pages)
        frames.stored_bytes.append(len(stored))
        frames.checksums.append(zlib.crc32(stored))
        frames.encodings.append(data.draw(st.sampled_from([0, 1, 2])))
        pages.write_bytes(stored)
        entry = {"size_bytes": len(stored), "frames": frames.pack()}
        reseal(manifest, lambda body, _: body.update(page_files=[entry]))
        read_everything(path)


def test_a_big_file_is_refused_by_its_size(tmp_path, path):
    """Sparse files: nothing of such size may ever be read into memory."""
    copy = tmp_path / "big"
    for file in FILES[:2]:
        shutil.copytree(path, copy)
        with (copy / file).open("r+b") as opened:
            opened.truncate(1 << 40)
        with pytest.raises(ImageError, match="the limit is"):
            verify_for(Chain.open(copy), 0)
        shutil.rmtree(copy)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, path):
    copy = tmp_path / "pipe"
    for file in (FILES[0], FILES[1], FILES[2]):
        shutil.copytree(path, copy)
        (copy / file).unlink()
        os.mkfifo(copy / file)
        with pytest.raises(ImageError, match="no regular file"):
            verify_for(Chain.open(copy), 0)
        shutil.rmtree(copy)


def test_names_in_the_directory_are_only_matched(path):
    """What does not look exactly like a generation is not one, and is left alone."""
    names = [
        "gen-1",
        "gen-0000001",
        "gen-00000x",
        "gen-\u0660\u0660\u0660\u0660\u0660\u0661",
        "GEN-000009",
        "gen-000009 ",
    ]
    for name in names:
        (path / name).mkdir()
    try:
        assert Chain.open(path).generations() == [0, 1, 2]
    finally:
        for name in names:
            (path / name).rmdir()
