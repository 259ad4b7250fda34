"""The promise: nothing in an image is trusted, not even if every checksum is right.

Records that fit the schema and make no sense are refused, and leave no process.
"""

import attrs
import pytest

from ckpt.image.chain import Chain
from ckpt.image.codec import pack, unpack
from ckpt.image.format import encode_manifest
from integration.errors.refusals import nobody_left, unchanged
from integration.harness import ckpt


def rewrite(image, change):
    """Replace the newest manifest by one that somebody has tampered with, digest and all."""
    path = image / "gen-000001" / "manifest"
    manifest = Chain.open(image).manifest(1)
    records = unpack(pack(manifest.records))
    change(records["processes"][0])
    path.write_bytes(encode_manifest(attrs.evolve(manifest, records=records))[0])


def set_first_file(process):
    for vma in process["resources"]["memory"]["vmas"]:
        if vma["file"] >= 0:
            vma["file"] = 10_000


def move_everything_out_of_reach(process):
    for vma in process["resources"]["memory"]["vmas"]:
        vma["start"] += 1 << 60
        vma["end"] += 1 << 60


def cut_registers(process):
    process["threads"][0]["resources"]["registers"]["prstatus"] = b"short"


def cut_xstate(process):
    process["threads"][0]["resources"]["registers"]["xstate"] = b"short"


def forget_the_leader(process):
    process["threads"] = [
        thread for thread in process["threads"] if thread["tid"] != process["pid"]
    ]


def forget_all_threads(process):
    process["threads"] = []


def repeat_a_thread(process):
    process["threads"].append(process["threads"][-1])


def be_nobody(process):
    process["pid"] = -5


def be_number_zero(process):
    process["pid"] = 0


def be_init(process):
    process["pid"] = 1


def name_a_strange_signal(process):
    process["stopped_by"] = 1000


def map_twice(process):
    memory = process["resources"]["memory"]
    memory["vmas"] = [*memory["vmas"], memory["vmas"][0]]


def turn_a_mapping_round(process):
    vma = process["resources"]["memory"]["vmas"][0]
    vma["start"], vma["end"] = vma["end"], vma["start"]


def ask_for_too_many_threads(process):
    process["threads"] += [process["threads"][-1] | {"tid": 1 << 30}]


HOSTILE = [
    set_first_file,
    move_everything_out_of_reach,
    cut_registers,
    cut_xstate,
    forget_the_leader,
    forget_all_threads,
    repeat_a_thread,
    be_nobody,
    be_number_zero,
    be_init,
    map_twice,
    turn_a_mapping_round,
    ask_for_too_many_threads,
]


@pytest.mark.parametrize("change", HOSTILE)
def test_records_that_make_no_sense(change, dead):
    """Whatever is refused, and wherever: an error of the image or of the restore."""
    image, pid = dead
    rewrite(image, change)
    with nobody_left(pid), unchanged(image):
        done = ckpt("restore", image)
    assert 30 <= done.returncode < 50, f"{done.returncode}\n{done.stderr}"
    sentence, *lines = done.stderr.splitlines()
    assert sentence.startswith("ckpt: ")
    assert all(line.startswith("  ") for line in lines)
