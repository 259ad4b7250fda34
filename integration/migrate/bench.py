"""How long a service is away while it moves, beside what was expected: `make bench-migrate`.

Two hosts on this machine, with shaped links between them; each case moves there and back. What the
client of redis saw is the longest time between two replies on any of its connections.

    make bench-migrate                      all cases
    make bench-migrate ARGS="redis --runs 2 --mib 256"
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from integration.bench.report import Collector, Goal, Of, show, show_goals
from integration.migrate.hosts import Hosts, Started, two_hosts
from integration.migrate.moving import live
from integration.migrate.services import redis
from integration.workloads.build import build

CONNECTIONS = 50
REPLIES_PER_S = 20_000
"""Half of them are acknowledged writes."""
GOALS_MS = {"10gbit": 60, "1gbit": 150}
SIZES_MIB = (256, 1024, 4096)
WRITES_PER_S = 10_000
AWAY = "away"


def measure_redis(hosts: Hosts, folder: Path, mib: int, runs: int) -> Iterator[dict[str, Any]]:
    """Move it under load, `runs` times; yield what each move took."""
    move = live(hosts, folder)
    server: Started = redis.start(hosts, folder, mib=mib)
    with redis.start_load(hosts, mib=mib, connections=CONNECTIONS, rate=REPLIES_PER_S) as load:
        redis.tell(load, "go")
        redis.tell(load, f"wait {REPLIES_PER_S}")
        redis.report(load)
        for _ in range(runs):
            server = move(server)
            redis.tell(load, f"wait {REPLIES_PER_S}")
            yield server.said | {"gap_ms": redis.report(load)["longest_gap_ms"]}  # type: ignore[attr-defined]
        redis.tell(load, "pause")
        redis.tell(load, "verify")
    server.close()


def measure_writer(hosts: Hosts, folder: Path, mib: int, runs: int) -> Iterator[dict[str, Any]]:
    """Move a program that writes at one rate into memory of some size."""
    move = live(hosts, folder)
    words = [build("writer"), "--rate", str(WRITES_PER_S), "--mib", str(mib)]
    work: Started = hosts.a.start(words, cwd=folder)
    assert work.line() == "ready"
    for _ in range(runs):
        work = move(work)
        yield work.said  # type: ignore[attr-defined]
    assert work.ask("check") == "ok"
    work.close()


def _note(found: Collector, case: str, move: dict[str, Any]) -> None:
    """Add what one move took: as it was felt, and as it was expected before the freeze."""
    felt_ms = move.get("gap_ms", move["downtime_ms"])
    found.add(case, AWAY, "ms", "felt", felt_ms)
    found.add(case, AWAY, "ms", "expected", move["expected_downtime_ms"])
    found.add(case, "stood still", "ms", "felt", move["downtime_ms"])
    found.add(case, "rounds", "", "felt", len(move["rounds"]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-migrate")
    parser.add_argument("cases", nargs="*", help="redis, sizes; all of them if none is named")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024)
    chosen = parser.parse_args()
    found = Collector(("felt", "expected"))
    goals: dict[tuple[str, str], tuple[Goal, ...]] = {}
    if "redis" in (chosen.cases or ["redis"]):
        for link, goal_ms in GOALS_MS.items():
            case = f"redis {chosen.mib} MiB, {link}"
            # Within a factor of two of what was expected.
            goals[case, AWAY] = (Goal(goal_ms), Goal(2, Of.RATIO), Goal(0.5, Of.RATIO, True))
            with two_hosts() as hosts, tempfile.TemporaryDirectory() as folder:
                hosts.shape(link)
                for move in measure_redis(hosts, Path(folder), chosen.mib, chosen.runs):
                    _note(found, case, move)
    if "sizes" in (chosen.cases or ["sizes"]):
        for mib in SIZES_MIB:
            with two_hosts() as hosts, tempfile.TemporaryDirectory() as folder:
                hosts.shape("10gbit")
                for move in measure_writer(hosts, Path(folder), mib, chosen.runs):
                    _note(found, f"writer {mib} MiB, 10gbit", move)
        found.note("writer: the largest may be away for twice as long as the smallest")
    section = found.section("A tree moves to another host", goals)
    console = Console()
    show(console, section)
    show_goals(console, [section])


if __name__ == "__main__":
    main()
