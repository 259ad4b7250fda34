"""redis with data of some size, under clients that stay connected and note every acknowledgement.

No connection is reset, every acknowledged write is there, redis's digest of all data is the same on
both sides of a move without writes.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from integration.apps.resp import Redis
from integration.harness import CKPT
from integration.migrate.hosts import SERVICE, Hosts, Started
from integration.migrate.moving import Move

PORT = 6379
OPTIONS = f"--port {PORT} --bind 0.0.0.0 --protected-mode no --daemonize no"
VALUE_BYTES = 960
KEY_BYTES = 1 << 10
"""What a key takes with its value, nearly."""
SETTLED = 2000
"""So many replies are enough to tell that it runs."""


def start(hosts: Hosts, directory: Path, *, mib: int) -> Started:
    """Start a server on `a`, with data; its address must be there."""
    command = ["redis-server", *OPTIONS.split(), "--enable-debug-command", "yes", "--save", ""]
    server = hosts.a.start(command, cwd=directory)
    while "Ready to accept connections" not in server.line():
        pass
    with hosts.client.network():
        client = Redis(PORT, SERVICE)
    with client:
        filled = client.ask("DEBUG", "POPULATE", str(n_keys(mib)), "key", str(VALUE_BYTES))
        assert filled == "OK"
    return server


def n_keys(mib: int) -> int:
    return mib * (1 << 20) // KEY_BYTES


def start_load(hosts: Hosts, *, mib: int, connections: int, rate: float) -> Started:
    """Connect clients, in the client's host; they wait for `go`."""
    python = CKPT[0]
    command = [python, "-m", "integration.migrate.redis_load", SERVICE, str(PORT)]
    command += ["--connections", str(connections), "--rate", str(rate)]
    load = hosts.client.start([*command, "--keys", str(n_keys(mib))])
    assert load.line() == "connected"
    return load


def tell(load: Started, command: str) -> str:
    """Have the clients do something; what they find wrong fails the test in their own words."""
    with contextlib.suppress(BrokenPipeError):  # it has ended, and said why
        load.tell(command)
    answer = load.line()
    assert not answer.startswith("failed"), answer
    return answer


def report(load: Started) -> dict[str, Any]:
    figures = json.loads(tell(load, "report"))
    assert isinstance(figures, dict)
    return figures


def digest(hosts: Hosts) -> str:
    with hosts.client.network():
        client = Redis(PORT, SERVICE)
    with client:
        found = client.ask("DEBUG", "DIGEST")
    assert isinstance(found, str)
    assert set(found) != {"0"}, "redis holds nothing"
    return found


def check(
    hosts: Hosts,
    move: Move,
    directory: Path,
    *,
    mib: int,
    connections: int = 20,
    rate: float = 2000,
    moves: int = 2,
) -> dict[str, Any]:
    """Move it under load, then once while nobody writes; return the reports of the clients."""
    server = start(hosts, directory, mib=mib)
    with start_load(hosts, mib=mib, connections=connections, rate=rate) as load:
        tell(load, "go")
        tell(load, f"wait {SETTLED}")
        figures = {"before": report(load), "moves": []}
        for _ in range(moves):
            server = move(server)
            tell(load, f"wait {SETTLED}")
            figures["moves"].append(report(load))
        tell(load, "pause")
        before = digest(hosts)
        server = move(server)
        with server:
            assert digest(hosts) == before
            tell(load, "go")
            tell(load, f"wait {SETTLED}")
            figures["verified"] = json.loads(tell(load, "verify"))
    return figures
