"""A PostgreSQL server, all of its processes and its shared memory, killed and brought back.

What was committed is there, what was begun is not half done, and pg_amcheck finds every table and
index whole. Its own user runs it, in a directory of the test.
"""

import contextlib
import os
import shutil
import signal
import socket
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
with socket.create_server(("127.0.0.1", 0)) as free:
    PORT = str(free.getsockname()[1])
ENVIRONMENT = {"PATH": os.environ["PATH"], "PGPORT": PORT, "PGDATABASE": "postgres"}
SETTINGS = {
    "port": PORT,
    "listen_addresses": "",
    "shared_buffers": "4MB",
    "fsync": "off",
    "max_connections": "20",
    "autovacuum": "off",
    "logging_collector": "off",
}
HELPERS = 4
"""The checkpointer, the background writer, the log writer, the launcher of replication."""
UNDER_WAY = f"""
PGHOST=$1 PGPORT={PORT} PGDATABASE=postgres; export PGHOST PGPORT PGDATABASE; shift
"$@" >/dev/null & server=$!
until {BIN}/pg_isready -q; do sleep 0.1; done
{BIN}/pgbench -i -q -s 1 2>/dev/null >&2
echo begun
{BIN}/pgbench -n -c 4 -T 3600 >/dev/null & clients=$!
read -r word
kill $clients
wait $clients
echo done
read -r word
kill $server
wait $server
"""
N_EACH, A_SECOND = 600, 240
"""Transactions of each of four clients over TCP, and how many all of them begin in a second."""
become_subreaper()


@pytest.fixture
def home():
    """A directory that the server's user can reach, unlike those of pytest."""
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    shutil.chown(directory, OWNER)
    yield directory
    shutil.rmtree(directory)


def command(program, *arguments):
    return as_owner(BIN / program, *arguments)


def as_owner(*words):
    return ["setpriv", "--reuid", OWNER, "--regid", OWNER, "--init-groups", *map(str, words)]


def run(home, program, *arguments):
    done = subprocess.run(
        command(program, *arguments),
        cwd=home,
        env=ENVIRONMENT | {"PGHOST": str(home)},
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


def prepare(home, **more):
    """Make a cluster and return how its server is started."""
    run(home, "initdb", "-N", "-A", "trust", "-D", home / "data")
    settings = [f"-c{name}={value}" for name, value in (SETTINGS | more).items()]
    return ["-D", home / "data", "-k", home, *settings]


class Postgres(App):
    """A server that answers, with the tables of pgbench."""

    def __init__(self, home, **more):
        super().__init__(command("postgres", *prepare(home, **more)), home)
        wait_until(lambda: is_ready(home))
        run(home, "pgbench", "-i", "-q", "-s", "1")


def bench(home):
    run(home, "pgbench", "-n", "-c", "4", "-t", "50")


@contextlib.contextmanager
def bench_over_tcp(home):
    """Run pgbench from outside, at a rate that takes some seconds; yield when it is at it."""
    before = count_history(home)
    options = ["-n", "-c", "4", "-t", str(N_EACH), "-R", str(A_SECOND), "-h", "127.0.0.1"]
    quiet = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "cwd": home,
        "env": ENVIRONMENT,
    }
    with subprocess.Popen(command("pgbench", *options), **quiet) as running:
        try:
            wait_until(lambda: count_history(home) > before or running.poll() is not None)
            yield running
        finally:
            running.kill()


def assert_done(running):
    said = running.communicate(timeout=ANSWER_S)[1]
    assert running.returncode == 0, said


def count_history(home):
    return int(ask(home, "select count(*) from pgbench_history"))


def check(home, n_transactions):
    """Every transaction of pgbench is there, and the sums of its tables agree."""
    assert int(ask(home, "select count(*) from pgbench_accounts")) == 100_000
    assert count_history(home) == n_transactions
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
        check(home, 200)
        helpers_of(server)
        assert dump(server.pid, image)["kind"] == "full"
        bench(home)
        family = helpers_of(server)
        assert dump(server.pid, image, "--kill")["kind"] == "delta"
        server.process.wait(ANSWER_S)
        reap_killed(family)
    with Restored(image) as back:
        assert descendants(back.pid) == family
        check(home, 400)
        bench(home)
        check(home, 600)
        run(home, "pg_amcheck", "--install-missing", "--heapallindexed", "postgres")
        os.kill(back.pid, signal.SIGTERM)
        assert back.process.wait(ANSWER_S) == 0


def test_clients_over_tcp_lose_no_transaction(home, tmp_path):
    image = tmp_path / "image"
    with Postgres(home, listen_addresses="127.0.0.1") as server:
        dump(server.pid, image)
        with bench_over_tcp(home) as running:
            wait_until(lambda: len(descendants(server.pid)) == HELPERS + 4)
            family = descendants(server.pid)
            assert dump(server.pid, image, "--kill")["kind"] == "delta"
            assert running.poll() is None
            server.process.wait(ANSWER_S)
            reap_killed(family)
            with Restored(image) as back:
                assert_done(running)
                check(home, 4 * N_EACH)
                with bench_over_tcp(home) as again:
                    assert dump(back.pid, image)["kind"] == "delta"
                    assert_done(again)
                check(home, 8 * N_EACH)
                run(home, "pg_amcheck", "--install-missing", "--heapallindexed", "postgres")
                os.kill(back.pid, signal.SIGTERM)
                assert back.process.wait(ANSWER_S) == 0


def test_transactions_go_on_where_their_clients_are_in_the_tree(home, tmp_path):
    image = tmp_path / "image"
    server = [BIN / "postgres", *prepare(home)]
    with App(as_owner("bash", "-c", UNDER_WAY, "bash", home, *server), home) as shell:
        assert shell.line() == "begun"
        wait_until(lambda: len(descendants(shell.pid)) == HELPERS + 6)
        assert dump(shell.pid, image)["kind"] == "full"
        family = descendants(shell.pid)
        assert dump(shell.pid, image, "--kill")["kind"] == "delta"
        shell.process.wait(ANSWER_S)
        reap_killed(family)
    with Restored(image) as back:
        assert descendants(back.pid) == family
        before = count_history(home)
        wait_until(lambda: count_history(home) > before)
        assert back.ask("enough") == "done"
        wait_until(lambda: len(descendants(back.pid)) == HELPERS + 1)
        check(home, count_history(home))
        run(home, "pg_amcheck", "--install-missing", "--heapallindexed", "postgres")
        assert back.quit() == 0
