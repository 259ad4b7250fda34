"""The promise: records that make no sense are shown, compared or refused: no bug of ours shows."""

import random

import attrs
import pytest

from ckpt.image.chain import Chain
from ckpt.image.codec import pack, unpack
from ckpt.image.format import encode_manifest
from integration.harness import dump
from integration.housekeeping.processes import told
from integration.workloads.driver import Program

N_TRIED = 60
BUG = 70
ODD = {
    int: [-1, 0, 1 << 31, 1 << 63, (1 << 64) - 1],
    bytes: [b"", b"\0" * 7, b"\x1b[2J" * 200],
    str: ["", "\x1b[2J\udc80", "/dev/zero", "/proc/self/mem"],
    bool: [True, False],
}


def leaves(value, way=()):
    """Yield the way to each plain value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*way, key))
    elif type(value) in ODD:
        yield way


def changed(records, way, value):
    copy = unpack(pack(records))
    place = copy
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    return copy


def of(records, way):
    for key in way:
        records = records[key]
    return records


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with Program("s_sysv", cwd=folder) as work:
        dump(work.pid, folder / "image")
        dump(work.pid, folder / "image")
    return folder / "image"


def test_no_record_brings_us_down(image, tmp_path):
    chance = random.Random(1)
    manifest = Chain.open(image).manifest(1)
    records = unpack(pack(manifest.records))
    ways = [way for way in leaves(records) if "xstate" not in way]
    path = image / "gen-000001" / "manifest"
    bugs = []
    for way in chance.sample(ways, N_TRIED):
        odd = chance.choice(ODD[type(of(records, way))])
        tampered = changed(records, way, odd)
        path.write_bytes(encode_manifest(attrs.evolve(manifest, records=tampered))[0])
        for command in (
            ["show", "--maps", "--files", image],
            ["diff", image, 0, 1],
            ["export", image, "-o", tmp_path / "core"],
            ["report", image, "-o", tmp_path / "page.html"],
        ):
            code, _, err = told(*command)
            if code == BUG:
                bugs.append((command[0], way, odd, err[-300:]))
    assert bugs == []
