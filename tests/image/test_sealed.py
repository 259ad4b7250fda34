"""Encrypted chains: what reads back, what does not, and that nothing can be moved or exchanged."""

import os
import shutil
import zlib
from pathlib import Path

import attrs
import pytest

from ckpt.errors import ImageCorrupt, ImageError, ImageSealed, ImageUnusable, ImageVersion
from ckpt.image.access import Access
from ckpt.image.arriving import Arriving
from ckpt.image.chain import Chain
from ckpt.image.codec import pack, unpack
from ckpt.image.format import FORMAT_VERSION, SEALED_VERSION, Kind, encode_manifest
from ckpt.image.header import encode_header
from ckpt.image.keys import PrivateKey, Recipient
from ckpt.image.pages import EncodedFrame, Encoding, FrameTable, decode_frame, encode_frame
from ckpt.image.reader import PageReader
from ckpt.image.sealing import Seal
from ckpt.image.squash import squash
from ckpt.image.verify import verify, verify_for
from tests.image.chain_model import (
    CHAIN_ID,
    KEY,
    PAGE,
    add_generation,
    data,
    hard_page,
    pages_by_frames,
    replay,
    soft_page,
)
from tests.image.make_golden import HISTORY, make_chain, reseal

OTHER = PrivateKey(bytes(range(1, 33)))
OPEN = Access(private=(KEY,))
MANIFEST_TWO = "gen-000002/manifest"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("sealed") / "chain"
    return make_chain(path, recipients=(OTHER.recipient, KEY.recipient))


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "chain")


def everything_in(path):
    return b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("private", [(KEY,), (OTHER,), (PrivateKey.generate(), KEY)])
def test_each_recipient_reads_all_of_it(path, private):
    chain = Chain.open(path, Access(private=private))
    assert chain.recipients == (OTHER.recipient, KEY.recipient)
    for number in range(len(HISTORY)):
        reader = PageReader(chain, number)
        assert reader.is_open
        assert reader.manifest.format_version == SEALED_VERSION
        assert reader.manifest.host == {"machine": "x86_64"}
        assert reader.manifest.extra["later"][1] == number
        for space, pages in replay(HISTORY, number).items():
            assert pages_by_frames(reader, space) == pages
    assert verify(chain) == []


def test_without_a_key_the_structure_is_there_and_nothing_else(path):
    chain = Chain.open(path)
    reader = verify_for(chain, 2)
    manifest = reader.manifest
    assert manifest.is_locked
    assert not reader.is_open
    assert (manifest.parent.generation, manifest.freeze_ms, manifest.page_size) == (1, 1.5, PAGE)
    assert len(reader.resolve("mm-1").starts) > 1
    for secret in (manifest.host, manifest.records, manifest.extra):
        for look in (dict, len, lambda one: one.get("pid")):
            with pytest.raises(ImageSealed, match="give --identity"):
                look(secret)
    with pytest.raises(ImageSealed, match="manifest: it is encrypted"):
        verify_for(chain, 2, decode=True)
    with pytest.raises(ValueError, match="without its key"):
        encode_manifest(manifest)
    assert verify(chain) == []


def test_another_key_is_refused_by_name(path):
    with pytest.raises(ImageSealed, match=str(KEY.recipient)):
        Chain.open(path, Access(private=(PrivateKey.generate(),)))


def test_no_page_and_no_record_is_anywhere_in_it(path):
    stored = everything_in(path)
    for secret in (hard_page(3)[:32], bytes([1]) * 64, b"x86_64", b"format 1.0 does not know"):
        assert secret not in stored
    assert hard_page(3) in everything_in(make_chain(path.with_name("plain")))


def test_no_two_generations_and_no_two_attempts_have_a_key_in_common(tmp_path):
    page = hard_page(9)
    seen = set()
    for name in ("one", "two"):
        chain = Chain.open(make_chain(tmp_path / name, history=[], recipients=(KEY.recipient,)))
        for _ in range(2):
            with chain.lock(), chain.begin(None, page_size=PAGE) as writer:
                writer.write_pages(page)
                writer.flush()
                file = next(chain.path.glob(".tmp-*/pages-0"))
                seen.add(file.read_bytes())
            add_generation(chain, {"mm-1": [data(0, page)]})
            seen.add(sorted(chain.path.glob("gen-*/pages-0"))[-1].read_bytes())
    assert len(seen) == 8


def test_a_chain_that_nobody_encrypts_is_as_it_was(tmp_path):
    path = make_chain(tmp_path / "plain")
    assert (path / "CKPT").read_bytes() == encode_header(CHAIN_ID)
    manifest = Chain.open(path, OPEN).manifest(0)
    assert (manifest.format_version, manifest.sealed) == (FORMAT_VERSION, None)


def test_what_is_added_later_is_encrypted_without_being_asked(tmp_path):
    path = tmp_path / "chain"
    chain = Chain.create_or_open(path, encrypt_to=(KEY.recipient,))
    add_generation(chain, {"mm-1": [data(0, soft_page(1))]})
    again = Chain.create_or_open(path)
    add_generation(again, {"mm-1": [data(0, soft_page(2))]}, 0)
    assert verify(Chain.open(path, OPEN)) == []
    assert Chain.open(path).manifest(1).is_locked
    with pytest.raises(ImageUnusable, match="it is encrypted to"):
        Chain.create_or_open(path, encrypt_to=(KEY.recipient, OTHER.recipient))
    plain = make_chain(tmp_path / "plain")
    with pytest.raises(ImageUnusable, match="it is not encrypted, and stays so"):
        Chain.create_or_open(plain, encrypt_to=(KEY.recipient,))


def arrive(source, chain, *, keep=True):
    """Send generation 0 of a chain as a migration does; return what was committed."""
    manifest = source.manifest(0)
    reader = PageReader(source, 0)
    with Arriving(chain) as arriving:
        for file in manifest.page_files:
            table = file.frames
            for frame, n_pages in zip(stored_frames(source, manifest), table.n_pages, strict=True):
                arriving.append(frame, n_pages, keep=keep)
        told = attrs.evolve(manifest, chain_id=chain.chain_id)
        told, tables = attrs.evolve(told, spaces={}), told.spaces
        committed = arriving.commit(encode_manifest(told)[0], "what came", tables, {"came": 1})
        here = PageReader(chain, 0)
        for space in manifest.spaces:
            assert pages_by_frames(here, space) == pages_by_frames(reader, space)
    return committed


def stored_frames(chain, manifest):
    (file,) = manifest.page_files
    raw = (chain.path / "gen-000000" / "pages-0").read_bytes()
    at = 0
    columns = zip(
        file.frames.stored_bytes, file.frames.encodings, file.frames.checksums, strict=True
    )
    for n_bytes, encoding, checksum in columns:
        yield EncodedFrame(memoryview(raw)[at : at + n_bytes], Encoding(encoding), checksum)
        at += n_bytes


def test_what_arrives_is_sealed_as_it_comes(tmp_path):
    plain = Chain.create_or_open(tmp_path / "plain")
    add_generation(plain, {"mm-1": [data(0, soft_page(1)), data(8, hard_page(2))]})
    chain = Chain.create_or_open(tmp_path / "chain", encrypt_to=(KEY.recipient,))
    with chain.lock():
        committed = arrive(plain, chain, keep=False)
    again = Chain.open(tmp_path / "chain", OPEN)
    assert verify(again) == verify(Chain.open(tmp_path / "chain")) == []
    assert again.manifest(0).records == {"came": 1}
    assert again.manifest(0).digest == committed.digest
    assert Chain.open(tmp_path / "chain").manifest(0).is_locked
    pages = pages_by_frames(PageReader(plain, 0), "mm-1")
    assert pages_by_frames(PageReader(again, 0), "mm-1") == pages
    stored = (tmp_path / "chain" / "gen-000000" / "pages-0").read_bytes()
    assert not [
        one for one in stored_frames(plain, plain.manifest(0)) if bytes(one.stored) in stored
    ]
    add_generation(Chain.open(tmp_path / "chain"), {"mm-1": [data(0, soft_page(2))]}, 0)
    assert verify(Chain.open(tmp_path / "chain", OPEN)) == []


def test_what_arrives_encrypted_already_is_refused(tmp_path):
    chain = Chain.create_or_open(tmp_path / "chain", encrypt_to=(KEY.recipient,))
    frame = EncodedFrame(bytes(4096 + 28), Encoding.SEALED_RAW, 0)
    with chain.lock(), Arriving(chain) as arriving, pytest.raises(ImageCorrupt, match="frame 0"):
        arriving.append(frame, 1, keep=True)
    assert chain.generations() == []


@pytest.mark.parametrize("private", [(KEY,), (OTHER,)])
def test_it_is_merged_with_the_key_and_stays_encrypted(path, private):
    chain = Chain.open(path, Access(private=private))
    before = {space: pages_by_frames(PageReader(chain, 2), space) for space in replay(HISTORY, 2)}
    nonces = {sealed_records(path, 2)[:12]}
    squash(chain, 2)
    merged = Chain.open(path, OPEN)
    assert merged.generations() == [2]
    assert verify(merged) == verify(Chain.open(path)) == []
    reader = PageReader(merged, 2)
    assert reader.manifest.kind is Kind.FULL
    assert {space: pages_by_frames(reader, space) for space in before} == before
    assert reader.manifest.extra["later"][1] == 2
    assert Chain.open(path).manifest(2).is_locked
    nonces.add(sealed_records(path, 2)[:12])
    assert len(nonces) == 2, "the same key, so another nonce"


def test_without_the_key_nothing_is_merged(path):
    before = everything_in(path)
    with pytest.raises(ImageSealed):
        squash(Chain.open(path), 2)
    assert everything_in(path) == before


def sealed_records(path, number):
    taken = []
    copy = shutil.copy(path / f"gen-{number:06d}/manifest", path.with_name("manifest"))
    reseal(Path(copy), lambda body, _: taken.append(body["sealed"]))
    return taken[0]


# -- what is moved, exchanged, or altered by somebody who can do sums -----------------------------


def frames_of(path, number):
    return Chain.open(path).manifest(number).page_files


def test_a_frame_opens_in_its_own_place_only():
    raw = memoryview(hard_page(1) + hard_page(2))
    key = bytes(range(32))
    seal = Seal(key, CHAIN_ID, 3)
    frame = encode_frame(raw, 1, seal, 7)
    assert decode_frame(frame.stored, frame.encoding, len(raw), seal, 7) == raw
    elsewhere = [
        (Seal(key, CHAIN_ID, 3), 8, frame.encoding),
        (Seal(key, CHAIN_ID, 4), 7, frame.encoding),
        (Seal(key, CHAIN_ID[::-1], 3), 7, frame.encoding),
        (Seal(bytes(32), CHAIN_ID, 3), 7, frame.encoding),
        (Seal(key, CHAIN_ID, 3), 7, 5 - frame.encoding),
    ]
    for other, number, encoding in elsewhere:
        with pytest.raises(ValueError, match="does not decrypt"):
            decode_frame(frame.stored, encoding, len(raw), other, number)


def change_open(path, change):
    """Alter what is readable of the newest manifest, with a right digest in the end."""

    def alter(body, _preamble):
        shown = unpack(body["open"])
        change(shown)
        body["open"] = pack(shown)

    reseal(path / MANIFEST_TWO, alter)


def swap_frames(path):
    """Exchange two frames of a page file, and their checksums and lengths with them."""
    pages = path / "gen-000002" / "pages-0"

    def change(shown):
        table = FrameTable.unpack(shown["page_files"][0]["frames"])
        first, second = table.stored_bytes[:2]
        stored = pages.read_bytes()
        swapped = stored[first : first + second] + stored[:first] + stored[first + second :]
        pages.write_bytes(swapped)
        for column in (table.stored_bytes, table.checksums, table.encodings, table.n_pages):
            column[0], column[1] = column[1], column[0]
        shown["page_files"][0]["frames"] = table.pack()

    change_open(path, change)


def set_time(path):
    change_open(path, lambda shown: shown.update(created_s=1.0))


def set_parent(path):
    change_open(path, lambda shown: shown["parent"].update(generation=0))


def drop_keys(path):
    change_open(path, lambda shown: shown.update(keys=shown["keys"][1:]))


def exchange_records(path):
    """Take the encrypted part from another generation."""
    taken = []
    reseal(path / "gen-000001/manifest", lambda body, _: taken.append(body["sealed"]))
    reseal(path / MANIFEST_TWO, lambda body, _: body.update(sealed=taken[0]))


def exchange_keys(path):
    taken = []
    reseal(path / "gen-000001/manifest", lambda body, _: taken.append(unpack(body["open"])["keys"]))
    change_open(path, lambda shown: shown.update(keys=taken[0]))


@pytest.mark.parametrize(
    "alter", [swap_frames, set_time, set_parent, drop_keys, exchange_records, exchange_keys]
)
def test_who_has_no_key_cannot_alter_it_unnoticed(path, alter):
    alter(path)
    with pytest.raises(ImageCorrupt, match=r"does not (decrypt|open)") as caught:
        verify_for(Chain.open(path, OPEN), 2)
    assert caught.value.path == str(path / MANIFEST_TWO)


def test_a_page_altered_with_its_checksum_is_found(path):
    """Only who has the key can make such a manifest; the tag of the frame finds it all the same."""
    chain = Chain.open(path, OPEN)
    manifest = chain.manifest(2)
    pages = path / "gen-000002" / "pages-0"
    stored = bytearray(pages.read_bytes())
    stored[20] ^= 1
    pages.write_bytes(stored)
    frames = manifest.page_files[0].frames
    frames.checksums[0] = zlib.crc32(stored[: frames.stored_bytes[0]])
    with pytest.raises(ImageCorrupt, match=r"pages-0 is damaged: frame 0 .* does not decrypt"):
        verify_for(chain, 2, decode=True)


def test_a_readable_generation_does_not_get_into_it(path):
    plain = make_chain(path.with_name("plain"))
    shutil.rmtree(path / "gen-000002")
    shutil.copytree(plain / "gen-000002", path / "gen-000002")
    with pytest.raises(ImageCorrupt, match="it is not encrypted, and its chain is"):
        Chain.open(path).manifest(2)


def test_an_encrypted_generation_is_none_of_another_chain(path):
    plain = make_chain(path.with_name("plain"))
    shutil.rmtree(plain / "gen-000002")
    shutil.copytree(path / "gen-000002", plain / "gen-000002")
    with pytest.raises(ImageVersion, match=r"format 2.0, .* a chain that is not encrypted"):
        Chain.open(plain, OPEN).manifest(2)


@pytest.mark.parametrize(
    "lines", ["", "recipient ckpt1abc\n", f"recipient {KEY.recipient}\n" * 33, "recipient\n"]
)
def test_a_header_without_good_recipients_is_damaged(path, lines):
    (path / "CKPT").write_text(f"ckpt image 2.0\nchain {CHAIN_ID}\n{lines}")
    with pytest.raises(ImageCorrupt, match=r"CKPT is damaged: .*recipient"):
        Chain.open(path)


def test_a_recipient_that_nobody_can_be_is_found_before_anything_is_written(tmp_path):
    path = make_chain(tmp_path / "chain", history=[], recipients=(Recipient(bytes(32)),))
    chain = Chain.open(path)
    with chain.lock(), pytest.raises(ImageCorrupt, match="a recipient in it"):
        chain.begin(None)
    assert chain.generations() == []


def test_a_recipient_that_is_lost_from_the_header_is_missed(path):
    (path / "CKPT").write_bytes(encode_header(CHAIN_ID, [KEY.recipient]))
    for access in (OPEN, Access()):
        with pytest.raises(ImageCorrupt, match="to others than its chain"):
            Chain.open(path, access).manifest(2)


@pytest.mark.parametrize("name", ["gen-000000/pages-0", MANIFEST_TWO])
def test_every_flipped_bit_is_found(original, tmp_path, name):
    """With the key and without; at some places of each file (the older chains try all of them)."""
    path = shutil.copytree(original, tmp_path / "chain")
    good = (path / name).read_bytes()
    for at in range(0, len(good), max(1, len(good) // 40)):
        spoilt = bytearray(good)
        spoilt[at] ^= 1 << at % 8
        (path / name).write_bytes(spoilt)
        for access in (OPEN, Access(trusts_anybody=True)):
            with pytest.raises(ImageError):
                verify_for(Chain.open(path, access), 2, decode=access is OPEN)
    (path / name).write_bytes(good)
    verify_for(Chain.open(path, OPEN), 2, decode=True)


def test_random_bytes_in_place_of_any_part_are_image_errors(path):
    for part in ("open", "sealed"):
        reseal(path / MANIFEST_TWO, lambda body, _, part=part: body.update({part: os.urandom(99)}))
        with pytest.raises(ImageCorrupt):
            Chain.open(path, OPEN).manifest(2)
