"""Page tables are believed to be in place by the frames of some of their pages, or not at all."""

import os
import subprocess
import sys

import pytest

from ckpt.kernel import pagemap
from ckpt.kernel.pagemap import PM_FILE, PM_MMAP_EXCLUSIVE, PM_PRESENT, PM_SWAP
from ckpt.kernel.procfs import maps
from ckpt.tracker import frames
from ckpt.tracker.frames import N_WITNESSES, TABLE_BYTES, confirm, table_reader
from ckpt.units import Pid

PAGE = 4096
TABLE = 0x7F00_0000_0000
OWN = PM_PRESENT | PM_MMAP_EXCLUSIVE
PID = Pid(4711)


class Tables(dict[int, int]):
    """Page tables: address of a page -> its word in pagemap; pages not named have none."""

    def read(self, table):
        return [self.get(at, 0) for at in range(table, table + TABLE_BYTES, PAGE)]

    def confirm(self, populated, clean, before):
        return confirm(self.read, populated, clean, before)

    def witnesses_of(self, populated):
        return self.confirm(populated, [], {})[1]


@pytest.fixture
def tables():
    return Tables()


@pytest.fixture
def state_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "STATE_DIR", tmp_path / "state")
    return tmp_path / "state"


def fill(tables, at, first_frame, indexes=range(512), kind=OWN):
    for index in indexes:
        tables[at + index * PAGE] = kind | first_frame + index


def whole(at, n_tables=1):
    return [(at, at + n_tables * TABLE_BYTES)]


def test_a_table_that_stayed_is_believed(tables):
    fill(tables, TABLE, 1000)
    before = tables.witnesses_of(whole(TABLE))
    assert len(before[TABLE]) == N_WITNESSES
    clean = [(TABLE + 5 * PAGE, TABLE + 300 * PAGE)]
    assert tables.confirm(whole(TABLE), clean, before)[0] == clean


def test_a_table_that_came_from_elsewhere_is_not(tables):
    fill(tables, TABLE, 1000)
    fill(tables, TABLE + TABLE_BYTES, 5000)
    both = whole(TABLE, 2)
    before = tables.witnesses_of(both)
    assert tables.confirm(both, both, before)[0] == both
    fill(tables, TABLE, 5000)
    fill(tables, TABLE + TABLE_BYTES, 1000)
    assert tables.confirm(both, both, before)[0] == []


def test_without_witnesses_nothing_is_believed(tables):
    fill(tables, TABLE, 1000)
    assert tables.confirm(whole(TABLE), whole(TABLE), {})[0] == []


def test_a_frame_that_was_given_out_again_is_no_witness(tables):
    """What lies in a frame that was freed and taken again has been written since: it is dirty."""
    fill(tables, TABLE, 1000)
    before = tables.witnesses_of(whole(TABLE))
    fill(tables, TABLE, 9000, range(0, 512, 2))
    in_new_frames = [(TABLE + i * PAGE, TABLE + (i + 1) * PAGE) for i in range(0, 512, 2)]
    assert tables.confirm(whole(TABLE), in_new_frames, before)[0] == []


def test_one_clean_witness_is_enough(tables):
    fill(tables, TABLE, 1000)
    before = tables.witnesses_of(whole(TABLE))
    address, _ = before[TABLE][-1]
    fill(tables, TABLE, 9000, set(range(512)) - {(address - TABLE) // PAGE})
    assert tables.confirm(whole(TABLE), whole(TABLE), before)[0] == whole(TABLE)


@pytest.mark.parametrize(
    "kind",
    [PM_PRESENT, OWN | PM_FILE, PM_SWAP, PM_MMAP_EXCLUSIVE],
    ids=["shared", "file", "swap", "no"],
)
def test_only_a_page_that_has_its_frame_alone_can_witness(tables, kind):
    fill(tables, TABLE, 1000, kind=kind)
    assert tables.witnesses_of(whole(TABLE)) == {TABLE: []}


def test_frames_that_may_not_be_seen_are_no_witnesses(tables):
    for index in range(512):
        tables[TABLE + index * PAGE] = OWN
    before = tables.witnesses_of(whole(TABLE))
    assert tables.confirm(whole(TABLE), whole(TABLE), before)[0] == []


def test_few_pages_are_all_witnesses_and_many_are_spread(tables):
    few = range(100, 110)
    fill(tables, TABLE, 1000, few)
    chosen = tables.witnesses_of(whole(TABLE))[TABLE]
    assert [address for address, _ in chosen] == [TABLE + i * PAGE for i in few]
    fill(tables, TABLE, 1000, range(1, 500))
    spread = [address for address, _ in tables.witnesses_of(whole(TABLE))[TABLE]]
    assert N_WITNESSES // 2 <= len(spread) <= N_WITNESSES
    assert max(spread) - min(spread) > TABLE_BYTES * 3 // 4


def test_each_table_is_looked_at_once_however_many_spans_it_has(tables):
    fill(tables, TABLE, 1000)
    fill(tables, TABLE + TABLE_BYTES, 5000)
    spans = [(TABLE + i * PAGE, TABLE + (i + 1) * PAGE) for i in range(0, 1024, 3)]
    assert sorted(tables.witnesses_of(spans)) == [TABLE, TABLE + TABLE_BYTES]


def test_witnesses_are_noted_and_taken_once(tables, state_dir):
    fill(tables, TABLE, 1000)
    witnesses = tables.witnesses_of(whole(TABLE))
    frames.note(PID, witnesses)
    assert frames.take(PID) == witnesses
    assert frames.take(PID) == {}
    assert list(state_dir.iterdir()) == []


def test_a_torn_note_costs_witnesses_and_invents_none(tables, state_dir):
    fill(tables, TABLE, 1000)
    witnesses = tables.witnesses_of(whole(TABLE))
    for n_bytes in (0, 7, 8, 20, 40):
        frames.note(PID, witnesses)
        (path,) = state_dir.iterdir()
        path.write_bytes(path.read_bytes()[:n_bytes])
        taken = frames.take(PID)
        assert set(taken.get(TABLE, [])) <= set(witnesses[TABLE])


def test_the_tables_of_a_live_process_have_witnesses():
    """Of a process that nobody shares memory with: a spawned one, and memory that it wrote."""
    with subprocess.Popen(
        [sys.executable, "-c", "b = bytearray(b'x' * 2**23); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline()
        pid = Pid(process.pid)
        own = [
            (vma.span.start, vma.span.end)
            for vma in maps.read_maps(pid)
            if vma.writable and vma.span.len_bytes > 2**22
        ]
        fd = pagemap.open_pagemap(pid)
        witnesses = confirm(table_reader(fd), own, [], {})[1]
        os.close(fd)
        process.communicate(b"\n")
    if os.geteuid() == 0:
        assert sum(len(of_table) == N_WITNESSES for of_table in witnesses.values()) >= 3
    else:
        assert not any(witnesses.values())
