"""A PostgreSQL server, all of its processes and its shared memory, killed and brought back.

What was committed is there, what was begun is not half done, and pg_amcheck finds every table and
index whole. Its own user runs it, in a directory of the test.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from integration.apps.app import App, reap_killed
from integration.harness import Restored, become_subreaper, dump
from integration.workloads.driver import ANSWER_S, descendants

BIN = Path("/usr/lib/postgresql/15/bin")
OWNER = "postgres"
SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "4MB",
    "fsync": "off",
    "max_connections": "20",
    "autovacuum": "off",
    "logging_collector": "off",
}
HELPERS = 4
"""The checkpointer, the background writer, the log writer, the launcher of replication."""
become_subreaper()


@pytest.fixture
def home():
    """A directory that the server's user can reach, unlike those of pytest."""
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    shutil.chown(directory, OWNER)
    yield directory
    shutil.rmtree(directory)


def command(program, *arguments):
    words = [BIN / program, *arguments]
    return ["setpriv", "--reuid", OWNER, "--regid", OWNER, "--init-groups", *map(str, words)]


def run(home, program, *arguments):
    done = subprocess.run(
        command(program, *arguments),
        cwd=home,
        env={"PATH": os.environ["PATH"], "PGHOST": str(home), "PGDATABASE": "postgres"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"
    return done.stdout


def ask(home, query):
    return run(home, "psql", "-XAtc", query).strip()


def wait_until(holds):
    give_up_s = time.monotonic() + ANSWER_S
    while not holds():
        assert time.monotonic() < give_up_s


def is_ready(home):
    """Return whether the server takes connections: it says so in the last line of its own file."""
    told = home / "data" / "postmaster.pid"
    return told.exists() and told.read_text().rstrip().endswith("ready")


def helpers_of(server):
    """Return the processes that serve nobody, once those that did have ended."""
    wait_until(lambda: len(descendants(server.pid)) == HELPERS)
    return descendants(server.pid)


class Postgres(App):
    """A server that answers, with the tables of pgbench."""

    def __init__(self, home):
        run(home, "initdb", "-N", "-A", "trust", "-D", home / "data")
        settings = [f"-c{name}={value}" for name, value in SETTINGS.items()]
        words = ["-D", home / "data", "-k", home, *settings]
        super().__init__(command("postgres", *words), home)
        wait_until(lambda: is_ready(home))
        run(home, "pgbench", "-i", "-q", "-s", "1")


def bench(home):
    run(home, "pgbench", "-n", "-c", "4", "-t", "50")


def check(home, rounds):
    """Every transaction of pgbench is there, and the sums of its tables agree."""
    assert int(ask(home, "select count(*) from pgbench_accounts")) == 100_000
    assert int(ask(home, "select count(*) from pgbench_history")) == rounds * 200
    sums = ask(
        home,
        "select (select sum(abalance) from pgbench_accounts),"
        " (select sum(bbalance) from pgbench_branches),"
        " (select sum(tbalance) from pgbench_tellers),"
        " (select sum(delta) from pgbench_history)",
    )
    assert len(set(sums.split("|"))) == 1, sums


def test_postgres_comes_back_with_all_its_data(home, tmp_path):
    image = tmp_path / "image"
    with Postgres(home) as server:
        bench(home)
        check(home, 1)
        helpers_of(server)
        assert dump(server.pid, image)["kind"] == "full"
        bench(home)
        family = helpers_of(server)
        assert dump(server.pid, image, "--kill")["kind"] == "delta"
        server.process.wait(ANSWER_S)
        reap_killed(family)
    with Restored(image) as back:
        assert descendants(back.pid) == family
        check(home, 2)
        bench(home)
        check(home, 3)
        run(home, "pg_amcheck", "--install-missing", "--heapallindexed", "postgres")
        os.kill(back.pid, signal.SIGTERM)
        assert back.process.wait(ANSWER_S) == 0
