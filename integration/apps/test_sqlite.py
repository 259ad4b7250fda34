"""sqlite3 in the middle of a transaction: it goes on after a kill, and the database is whole.

Files are not in an image: they must be as they were at the checkpoint. So the newest generation is
restored onto the files as they are, an older one onto copies that were made when it was.

While the process is away nothing holds its locks: whoever opens the database then would take it for
one that has crashed. So nobody looks in between.
"""

import shutil
import sqlite3
import sys
from pathlib import Path

import pytest

from integration.apps.app import (
    PROGRAMS,
    App,
    Costs,
    is_running,
    kind_of_further_dumps,
    offered_trackers,
)
from integration.apps.programs.accounts import (
    FEW_PAGES,
    MANY_PAGES,
    digest,
    first_rows,
    read_rows,
    rows_after,
)
from integration.harness import Restored, become_subreaper, dump

become_subreaper()

STATES = {
    # A rollback journal, and the new pages in memory only: others may still read.
    "reserved": ("DELETE", MANY_PAGES, "read"),
    # The new pages are in the database already: nobody may read.
    "exclusive": ("DELETE", FEW_PAGES, ""),
    # A write-ahead log, and its index in shared memory.
    "wal": ("WAL", FEW_PAGES, "read"),
}


class Accounts(App):
    """The program with its transaction begun."""

    def __init__(self, path: Path, state: str) -> None:
        mode, cache_pages, _ = STATES[state]
        program = PROGRAMS / "accounts.py"
        super().__init__([sys.executable, program, path, mode, str(cache_pages)], path.parent)
        assert self.line() == "ready"


def others_can(path: Path) -> str:
    """Return what the locks let others do: read the rows of before, or nothing; never write."""
    database = sqlite3.connect(path, timeout=0)
    try:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            database.execute("BEGIN IMMEDIATE")
        assert read_rows(database) == first_rows()
    except sqlite3.OperationalError:
        return ""
    finally:
        database.close()
    return "read"


def has_shared_index(pid: int) -> bool:
    """Tell whether the index of a write-ahead log is mapped, shared and writable."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return any(" rw-s " in line and "-shm" in line for line in maps.splitlines())


def assert_whole(path: Path, rows: list[object]) -> None:
    """Look at the database when nobody uses it any more."""
    database = sqlite3.connect(path)
    try:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert read_rows(database) == rows
    finally:
        database.close()


def keep_files(path: Path, to: Path) -> None:
    to.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copyfile(file, to / file.name)


def put_files_back(path: Path, kept: Path) -> None:
    """Write into the files that exist: sqlite knows its database by the inode."""
    now = {file.name for file in path.parent.glob(f"{path.name}*")}
    for file in kept.iterdir():
        shutil.copyfile(file, path.parent / file.name)
        now.discard(file.name)
    for name in now:
        (path.parent / name).unlink()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("tracker", offered_trackers())
def test_a_transaction_goes_on(tracker, state, tmp_path, record_property):
    path, image, kept = tmp_path / "accounts.db", tmp_path / "image", tmp_path / "kept"
    costs = Costs(record_property, f"sqlite, {state}, {tracker}")
    with Accounts(path, state) as program:
        for nth in range(1, 5):
            assert program.ask(f"step {nth}") == f"stepped {nth}"
            dumped = dump(program.pid, image, "--tracker", tracker)
            assert dumped["kind"] == (kind_of_further_dumps(tracker) if nth > 1 else "full")
            costs.note(dumped)
            if nth == 2:
                keep_files(path, kept)
        assert others_can(path) == STATES[state][2]
        assert has_shared_index(program.pid) == (state == "wal")
    assert not is_running(program.pid)

    with Restored(image) as back:
        costs.note_restore(back.said)
        assert others_can(path) == STATES[state][2]
        assert has_shared_index(back.pid) == (state == "wal")
        assert back.ask("content") == f"content {digest(rows_after(4))}"
        assert back.ask("step 5") == "stepped 5"
        assert dump(back.pid, image, "--tracker", tracker)["kind"] == dumped["kind"]
        assert back.ask("commit") == "committed"
        assert back.quit() == 0
    assert_whole(path, rows_after(5))

    put_files_back(path, kept)
    with Restored(image, "--at", "1") as back:
        assert others_can(path) == STATES[state][2]
        assert back.ask("content") == f"content {digest(rows_after(2))}"
        assert back.ask("step 3") == "stepped 3"
        assert back.ask("commit") == "committed"
        assert back.quit() == 0
    assert_whole(path, rows_after(3))


@pytest.mark.parametrize("state", STATES)
def test_a_transaction_can_be_given_up(state, tmp_path):
    path, image = tmp_path / "accounts.db", tmp_path / "image"
    with Accounts(path, state) as program:
        assert program.ask("step 1") == "stepped 1"
        dump(program.pid, image)
    with Restored(image) as back:
        assert back.ask("rollback") == "rolled back"
        assert back.ask("content") == f"content {digest(first_rows())}"
        assert back.quit() == 0
    assert_whole(path, first_rows())


def test_a_database_that_another_has_locked_meanwhile_is_not_taken(tmp_path):
    path, image = tmp_path / "accounts.db", tmp_path / "image"
    with Accounts(path, "reserved") as program:
        dump(program.pid, image)
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(AssertionError, match=f"locking {path}: process [0-9]+ holds a lock"):
            Restored(image)
    finally:
        database.close()
    assert not is_running(program.pid)
    with Restored(image) as back:
        assert back.ask("step 1") == "stepped 1"
        assert back.ask("commit") == "committed"
        assert back.quit() == 0
    assert_whole(path, rows_after(1))
