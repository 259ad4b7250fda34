"""Works on a database in one long transaction, step by step as it is told; never ends it by itself.

Usage: accounts.py DATABASE JOURNAL_MODE CACHE_PAGES

Commands on stdin, one answer a line on stdout:

    step N       change the rows once more (N-th time)   "stepped N"
    commit       end the transaction                     "committed"
    rollback     give it up                              "rolled back"
    content      sum up what this connection sees        "content DIGEST"
    quit         end with status 0

The rows of any step are a pure function (`rows_after`), which a test uses too.
"""

import hashlib
import sqlite3
import sys
from collections.abc import Iterable

N_ROWS = 4_000
FEW_PAGES = 8
"""Of cache: what a step changes does not fit, so it is written before the commit."""
MANY_PAGES = 4_000

Row = tuple[int, int, str]


def first_rows() -> list[Row]:
    return [(number, number * 7 % 1000, f"account {number} " * 8) for number in range(N_ROWS)]


def rows_after(n_steps: int) -> list[Row]:
    """Return what the table holds after so many steps, without a database."""
    rows = {row[0]: row for row in first_rows()}
    for nth in range(1, n_steps + 1):
        for number in [number for number in rows if number % 5 == nth % 5]:
            rows[number] = (number, rows[number][1] + nth, f"step {nth}")
        for number in [number for number in rows if number % 97 == nth]:
            del rows[number]
        for number in range(nth * N_ROWS, nth * N_ROWS + 500):
            rows[number] = (number, nth, "new " * 20)
    return sorted(rows.values())


def step(database: sqlite3.Connection, nth: int) -> None:
    database.execute(
        "UPDATE account SET balance = balance + ?, name = ? WHERE id % 5 = ?",
        (nth, f"step {nth}", nth % 5),
    )
    database.execute("DELETE FROM account WHERE id % 97 = ?", (nth,))
    database.executemany(
        "INSERT INTO account VALUES (?, ?, ?)",
        [(number, nth, "new " * 20) for number in range(nth * N_ROWS, nth * N_ROWS + 500)],
    )


def digest(rows: Iterable[Row]) -> str:
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()


def read_rows(database: sqlite3.Connection) -> list[Row]:
    return database.execute("SELECT id, balance, name FROM account ORDER BY id").fetchall()


def open_database(path: str, journal_mode: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None)
    database.execute(f"PRAGMA journal_mode = {journal_mode}")
    database.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER, name TEXT)")
    database.execute("BEGIN")
    database.executemany("INSERT INTO account VALUES (?, ?, ?)", first_rows())
    database.execute("COMMIT")
    return database


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    path, journal_mode, cache_pages = sys.argv[1:]
    database = open_database(path, journal_mode)
    database.execute(f"PRAGMA cache_size = {int(cache_pages)}")
    database.execute("BEGIN IMMEDIATE")
    say("ready")
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "step":
            step(database, int(argument))
            say(f"stepped {argument}")
        elif command == "commit":
            database.execute("COMMIT")
            say("committed")
        elif command == "rollback":
            database.execute("ROLLBACK")
            say("rolled back")
        elif command == "content":
            say(f"content {digest(read_rows(database))}")
        elif command == "quit":
            database.close()
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
