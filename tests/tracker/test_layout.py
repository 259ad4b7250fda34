"""Which mappings are as they were, and what is kept of them between two dumps."""

import os

from ckpt.tracker import layout
from ckpt.units import Pid

BEFORE = frozenset({(0x1000, 0x3000, "rw-p"), (0x3000, 0x4000, "r--p"), (0x8000, 0x9000, "rw-p")})


def test_a_mapping_that_was_merged_is_not_steady():
    assert layout.steady(BEFORE, frozenset({(0x1000, 0x4000, "rw-p")})) == []


def test_a_mapping_that_was_protected_resized_or_split_is_not_steady():
    now = frozenset({(0x1000, 0x3000, "r--p"), (0x3000, 0x5000, "r--p"), (0x8000, 0x8800, "rw-p")})
    assert layout.steady(BEFORE, now) == []


def test_what_is_as_it_was_is_steady_and_neighbours_are_joined():
    assert layout.steady(BEFORE, BEFORE) == [(0x1000, 0x4000), (0x8000, 0x9000)]


def test_a_note_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "STATE_DIR", tmp_path / "state")
    pid = Pid(os.getpid())
    noted = layout.read_layout(pid)
    layout.note(pid, noted)
    assert noted
    assert layout.take(pid) == noted
    assert layout.take(pid) == frozenset()


def test_a_damaged_note_is_worth_nothing_more_than_what_is_read_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "STATE_DIR", tmp_path)
    (tmp_path / "7.layout").write_text("1000 2000 rw-p\nno mapping\n3000 4000 rw-p\n")
    assert layout.take(Pid(7)) == {(0x1000, 0x2000, "rw-p")}
