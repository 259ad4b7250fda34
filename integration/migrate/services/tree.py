"""Trees that speak to themselves: unix sockets between processes, pipelines of a shell."""

from pathlib import Path
from typing import Any

from integration.migrate.hosts import Hosts
from integration.migrate.moving import Move
from integration.workloads.build import build

COUNTERS = "mkfifo one two; (while read -r n <one; do echo $((n + 1)) >two; done) & " + (
    'while read -r word; do echo "$word" >one; read -r n <two; echo "$n"; done'
)


def check(hosts: Hosts, move: Move, directory: Path, *, moves: int = 2) -> dict[str, Any]:
    """Move two trees, one after the other: what was under way between processes arrives."""
    work = hosts.a.start([build("s_unix_tree")], cwd=directory)
    assert work.line() == "ready"
    for _ in range(moves):
        assert work.ask("step change").startswith("stepped")
        work = move(work)
        assert (said := work.ask("check")) == "ok", said
    work.tell("quit")
    assert work.wait() == 0
    work.close()
    return {}


def check_shell(hosts: Hosts, move: Move, directory: Path, *, moves: int = 2) -> dict[str, Any]:
    """Move a shell with children, fifos and pipes."""
    work = hosts.a.start(["bash", "-c", COUNTERS], cwd=directory)
    for nth in range(moves + 1):
        assert work.ask(str(nth * 10)) == str(nth * 10 + 1)
        if nth < moves:
            work = move(work)
    work.close()
    return {}
