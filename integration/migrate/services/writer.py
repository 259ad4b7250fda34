"""The program that writes memory in every way and knows what must be where, at some rate."""

from pathlib import Path
from typing import Any

from integration.migrate.hosts import Hosts
from integration.migrate.moving import Move
from integration.workloads.build import build


def check(
    hosts: Hosts, move: Move, directory: Path, *, rate: int, mib: int = 64, moves: int = 2
) -> dict[str, Any]:
    """Move it while it writes `rate` times a second; every page is as it must be each time."""
    command = [build("writer"), "--rate", str(rate), "--mib", str(mib)]
    work = hosts.a.start(command, cwd=directory)
    assert work.line() == "ready"
    for _ in range(moves):
        work = move(work)
        assert work.ask("check") == "ok"
        assert work.ask("step").startswith("stepped"), "it stands still"
        assert work.ask("check") == "ok"
    work.tell("quit")
    assert work.wait() == 0
    work.close()
    return {}
