"""A PostgreSQL server under pgbench from another host: no transaction fails, none is lost."""

import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from integration.apps.test_postgres import BIN, OWNER, as_owner
from integration.migrate.hosts import PREFIX, SERVICE, Hosts, Started
from integration.migrate.moving import Move

SETTINGS = {
    "listen_addresses": "*",
    "shared_buffers": "16MB",
    "fsync": "off",
    "max_connections": "20",
    "autovacuum": "off",
    "logging_collector": "off",
}
CLIENTS = 4
_AT_MOST_S = 600
"""The load ends when the moves are over; this is longer than they take."""


@contextmanager
def _home() -> Iterator[Path]:
    """A directory that the server's user can reach, unlike those of pytest."""
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    shutil.chown(directory, OWNER)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _start(hosts: Hosts, home: Path) -> Started:
    data = home / "data"
    initdb = as_owner(BIN / "initdb", "-N", "-A", "trust", "-D", data)
    hosts.a.must(initdb, cwd=home)
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {PREFIX}0/24 trust\n")
    settings = [f"-c{name}={value}" for name, value in SETTINGS.items()]
    server = hosts.a.start(as_owner(BIN / "postgres", "-D", data, "-k", home, *settings), cwd=home)
    ready = [BIN / "pg_isready", "-q", "-h", SERVICE, "-t", "5"]
    hosts.client.must(["bash", "-c", 'until "$@"; do :; done', "bash", *ready])
    return server


def _client(hosts: Hosts, program: str, *arguments: str) -> str:
    command = [BIN / program, "-h", SERVICE, "-U", OWNER, *arguments, "postgres"]
    return hosts.client.must(command)


def check(hosts: Hosts, move: Move, _directory: Path, *, moves: int = 2) -> dict[str, Any]:
    """Move it while transactions go on; all that pgbench counts are in the history."""
    with _home() as home:
        server = _start(hosts, home)
        _client(hosts, "pgbench", "-i", "-q", "-s", "1")
        options = ["-n", "-c", str(CLIENTS), "-P", "1", "-T", str(_AT_MOST_S)]
        command = [BIN / "pgbench", "-h", SERVICE, "-U", OWNER, *options, "postgres"]
        bench = hosts.client.start(["bash", "-c", 'exec "$@" 2>&1', "bash", *command])
        _wait_for_progress(bench)
        for _ in range(moves):
            server = move(server)
            _wait_for_progress(bench)
        # As its own timer would: it ends what is under way, and counts.
        bench.kill(signal.SIGALRM)
        said = _rest_of(bench)
        n_done = _number(r"actually processed: (\d+)", said)
        assert _number(r"failed transactions: (\d+)", said) == 0
        sums = _client(hosts, "psql", "-XAtc", _SUMS).strip().split("|")
        assert len(set(sums)) == 1, sums
        assert int(_client(hosts, "psql", "-XAtc", _COUNT)) == n_done
        _client(hosts, "pg_amcheck", "--install-missing", "--heapallindexed")
        server.kill(15)
        assert server.wait() == 0
        server.close()
    return {"transactions": n_done, "said": said}


_COUNT = "select count(*) from pgbench_history"
_SUMS = (
    "select (select sum(abalance) from pgbench_accounts),"
    " (select sum(bbalance) from pgbench_branches),"
    " (select sum(tbalance) from pgbench_tellers),"
    " (select sum(delta) from pgbench_history)"
)


def _wait_for_progress(bench: Started) -> None:
    """Wait for two seconds in which transactions were done, as pgbench says."""
    n_good = 0
    while n_good < 2:
        line = bench.line()
        assert not line.startswith("pgbench: error"), line
        found = re.match(r"progress: .* s, (\d+\.\d+) tps", line)
        if found:
            n_good = n_good + 1 if float(found[1]) else 0


def _rest_of(bench: Started) -> str:
    lines = []
    try:
        while True:
            lines.append(bench.line())
    except EOFError:
        assert bench.wait() == 0, lines
        bench.close()
    return "\n".join(lines)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found[1])
