"""One chain for each defect: the right error comes, names the file, and says what is wrong."""

import shutil
import zlib

import pytest

from ckpt.errors import ChainBroken, ImageCorrupt, ImageError, ImageUnusable, ImageVersion
from ckpt.image.chain import Chain
from ckpt.image.verify import verify, verify_for
from tests.image.make_golden import BROKEN, DEFECTS, SMALL_HISTORY, make_chain

ZERO, ONE, TWO = (f"gen-{n:06d}/manifest" for n in range(3))
PAGES_ZERO, PAGES_ONE, PAGES_TWO = (f"gen-{n:06d}/pages-0" for n in range(3))

EXPECTED = {
    "bit-flip-in-digest": (ImageCorrupt, ONE, "digest"),
    "bit-flip-in-frame": (ImageCorrupt, PAGES_ZERO, "frame 0 at byte 0: its checksum"),
    "bit-flip-in-manifest": (ImageCorrupt, ONE, "digest"),
    "damaged-header": (ImageCorrupt, "CKPT", "32 hex digits"),
    "delta-without-parent": (ImageCorrupt, ONE, "must name a parent"),
    "empty-run": (ImageCorrupt, TWO, "has no pages"),
    "field-missing": (ImageCorrupt, TWO, "'records'"),
    "field-of-wrong-type": (ImageCorrupt, TWO, "'tracker'"),
    "frame-announces-too-much": (ImageCorrupt, PAGES_TWO, "zstd header has another size"),
    "frame-too-big": (ImageCorrupt, TWO, "more than 1048576 bytes"),
    "full-with-parent-run": (ImageCorrupt, ZERO, "refers to a parent"),
    "missing-header": (ImageUnusable, "", "not an image directory"),
    "missing-manifest": (ImageCorrupt, ONE, "missing"),
    "missing-page-file": (ImageCorrupt, PAGES_ZERO, "missing"),
    "missing-parent": (ChainBroken, ZERO, "generation 1 was made against it"),
    "newer-major-manifest": (ImageVersion, TWO, "format 3.0"),
    "newer-major-version": (ImageVersion, "CKPT", "format 3.0"),
    "other-chain": (ChainBroken, TWO, "belongs to chain ffeeddcc"),
    "overlapping-runs": (ImageCorrupt, TWO, "overlap"),
    "page-file-is-a-link": (ImageCorrupt, PAGES_TWO, "no regular file"),
    "page-file-too-long": (ImageCorrupt, PAGES_TWO, "its manifest says"),
    "page-size-of-zero": (ImageCorrupt, ZERO, "page size 0"),
    "parent-digest-mismatch": (ChainBroken, ZERO, "its digest is another"),
    "parent-lacks-page": (ChainBroken, TWO, "503000-504000 of 'mm-1'"),
    "parent-not-older": (ImageCorrupt, ONE, "not older"),
    "run-past-the-end": (ImageCorrupt, TWO, "leave the address space"),
    "run-table-cut-short": (ImageCorrupt, ONE, "cannot hold 7 runs"),
    "source-out-of-range": (ImageCorrupt, TWO, "of a page stream of 3"),
    "swapped-generations": (ImageCorrupt, TWO, "generation 1 under the name of 2"),
    "truncated-manifest": (ImageCorrupt, TWO, "it should have"),
    "truncated-page-file": (ImageCorrupt, PAGES_ONE, "its manifest says"),
    "unaligned-run": (ImageCorrupt, TWO, "multiple of 4096"),
    "unknown-encoding": (ImageVersion, PAGES_TWO, "encoding 7"),
    "unknown-fate": (ImageCorrupt, TWO, "unknown fate 9"),
    "unordered-runs": (ImageCorrupt, TWO, "out of order"),
    "wrong-encoding": (ImageCorrupt, TWO, "raw frame"),
}


def test_every_defect_is_there_and_expected():
    assert {path.name for path in BROKEN.iterdir()} == set(DEFECTS) == set(EXPECTED)


def test_without_a_defect_the_chain_is_good(tmp_path):
    chain = Chain.open(make_chain(tmp_path / "good", history=SMALL_HISTORY))
    assert verify(chain) == []


@pytest.mark.parametrize("defect", sorted(EXPECTED))
def test_defect_is_named(defect):
    kind, file, phrase = EXPECTED[defect]
    with pytest.raises(ImageError) as caught:
        verify_for(Chain.open(BROKEN / defect), 2, decode=True)
    assert type(caught.value) is kind
    assert caught.value.path == str(BROKEN / defect / file)
    assert phrase in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("defect", sorted(set(EXPECTED) - {"frame-announces-too-much"}))
def test_defect_is_found_without_decoding(defect):
    with pytest.raises(EXPECTED[defect][0]):
        verify_for(Chain.open(BROKEN / defect), 2)


@pytest.mark.parametrize(
    "defect",
    sorted(name for name, (_, file, _) in EXPECTED.items() if file and file != "CKPT"),
)
def test_a_full_check_finds_it_too(defect):
    findings = verify(Chain.open(BROKEN / defect))
    file = EXPECTED[defect][1]
    assert any(file in finding.problem for finding in findings)


def test_what_a_defect_does_not_touch_stays_usable():
    verify_for(Chain.open(BROKEN / "truncated-page-file"), 0, decode=True)


def test_damage_appears_once_for_each_frame(tmp_path):
    path = tmp_path / "chain"
    shutil.copytree(BROKEN / "bit-flip-in-frame", path)
    assert [str(finding) for finding in verify(Chain.open(path))] == [
        f"generation 0: {path}/gen-000000/pages-0 is damaged: frame 0 at byte 0: its checksum is"
        " " + _checksums(path)
    ]


def _checksums(path):
    frames = Chain.open(path).manifest(0).page_files[0].frames
    stored = (path / "gen-000000/pages-0").read_bytes()[: frames.stored_bytes[0]]
    return f"{zlib.crc32(stored):08x}, it should be {frames.checksums[0]:08x}"
