"""Thousands of incremental dumps of a redis that is written to all the time, pruned to ten.

One process takes most of the dumps, as a long-lived user of the library would; one in 25 is
taken by the command. After each, everything that could pile up is counted (`growth`). At the end
the chain is verified, and its newest and its oldest generation are restored: all that redis has is
as it was (its own digest), and each write that was acknowledged before a dump is in it.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from integration.apps.app import App
from integration.apps.resp import Redis
from integration.apps.test_redis import Server, digest
from integration.harness import Restored, become_subreaper, ckpt, dump
from integration.soak.growth import Series, growths, read_held
from integration.workloads.driver import descendants

DUMPER = Path(__file__).with_name("dumper.py")
KEEP = 10
BY_COMMAND = 25
"""Every such dump is taken by the command, the others by the library."""
N_KEYS = 1000
N_CLIENTS = 10
N_REQUESTS = 2_000_000_000
"""More than it comes to: redis-benchmark makes new connections when it has done them."""
WINDOW = 200
"""So many dumps in a row must have found redis at work in between."""
COUNTER = "acknowledged"
_STATE_DIR = Path("/run/ckpt")


@attrs.define
class Outcome:
    """What a soak has shown."""

    held: Series = attrs.Factory(Series)
    """What `growth` judges."""
    times: Series = attrs.Factory(Series)
    n_dumps: int = 0
    n_by_command: int = 0
    n_requests: int = 0
    """Of redis-benchmark, as redis has counted them."""
    seconds: float = 0.0
    errors: list[str] = attrs.Factory(list)

    def troubles(self) -> list[str]:
        """Return all that should not have been."""
        return [*self.errors, *(f"grown: {grown}" for grown in growths(self.held))]

    def report(self) -> str:
        def change(name: str) -> str:
            return "{:.0f} ms, at the end {:.0f} ms".format(*self.times.medians(name))

        return "\n".join(
            [
                f"{self.n_dumps} dumps in {self.seconds:.0f} s, {self.n_by_command} of them by the"
                f" command; redis answered {self.n_requests} requests; {len(self.errors)} errors",
                f"dump and prune (median): at first {change('all ms')}",
                f"frozen (median): at first {change('frozen ms')}",
                *map(str, self.held),
                *(f"ERROR {trouble}" for trouble in self.troubles()),
            ]
        )


class Soak:
    """One redis, its load, who dumps it, and the chain."""

    def __init__(self, folder: Path, server: Server, client: Redis, load: App) -> None:
        self.image = folder / "image"
        self.server, self.client, self._load = server, client, load
        self.outcome = Outcome()
        self.acknowledged: dict[int, int] = {}
        """What the counter was when a generation was taken."""
        self._seen_requests = 0

    def dump(self, dumper: App, *, by_command: bool) -> None:
        """Take one more, and count what is left behind."""
        counter = self.client.ask("INCR", COUNTER)
        assert isinstance(counter, int)
        self.outcome.n_dumps += 1
        self.outcome.n_by_command += by_command
        self._see_load()
        made = self._by_command() if by_command else json.loads(dumper.ask("dump"))
        self._judge(made)
        if "generation" in made:
            self.acknowledged[made["generation"]] = counter
            self.acknowledged.pop(made["generation"] - KEEP, None)
        # Those by the command take another time, and would be missing in half of the windows.
        if not by_command and "error" not in made:
            times = {"all ms": made["all_ms"], "frozen ms": made["freeze_ms"]}
            self.outcome.times.take(times)
            self.outcome.held.take(self._count(dumper.pid))

    def _see_load(self) -> None:
        """Count what redis has answered; of nobody but us, the load stands still."""
        self.outcome.n_requests = self._count_requests()
        if self.outcome.n_dumps % WINDOW == 0:
            of_others = self.outcome.n_requests - self._seen_requests - 2 * WINDOW
            self._seen_requests = self.outcome.n_requests
            if of_others < WINDOW:
                self.outcome.errors.append(
                    f"dump {self.outcome.n_dumps}: redis had {of_others} requests in {WINDOW} dumps"
                )

    def _count_requests(self) -> int:
        return int(_field(str(self.client.ask("INFO", "stats")), "total_commands_processed"))

    def _by_command(self) -> dict[str, Any]:
        try:
            made = dump(self.server.pid, self.image)
        except AssertionError as error:
            return {"error": str(error)}
        pruned = ckpt("prune", "--keep-last", str(KEEP), self.image)
        return made if pruned.returncode == 0 else {"error": f"prune: {pruned.stderr}"}

    def _judge(self, made: dict[str, Any]) -> None:
        at = f"dump {self.outcome.n_dumps}"
        if "error" in made:
            self.outcome.errors.append(f"{at}: {made['error']}")
            return
        if made["kind"] != "delta" and self.outcome.n_dumps > 1:
            self.outcome.errors.append(f"{at}: full: {made['reason']}")
        self.outcome.errors += [f"{at}: {warning}" for warning in made["warnings"]]
        if self._load.process.poll() is not None:
            self.outcome.errors.append(f"{at}: redis-benchmark ended with an error")

    def _count(self, dumper_pid: int) -> dict[str, float]:
        names = sorted(path.name for path in self.image.iterdir())
        stray = [name for name in names if not name.startswith("gen-")]
        sizes = (path.stat().st_size for path in self.image.rglob("*"))
        return {
            **read_held("redis", self.server.pid),
            **read_held("ckpt", dumper_pid),
            "chain: generations": len(names) - len(stray),
            "chain: other files": len(stray),
            "chain: KiB": sum(sizes) / 1024,
            "all processes": len(descendants(os.getpid())),
            "temporary files": len(os.listdir(tempfile.gettempdir())),
            "notes in /run": len(list(_STATE_DIR.glob(f"{self.server.pid}.*"))),
        }

    def finish(self, dumper: App) -> None:
        """Take a last dump at rest; what comes back from the chain is what redis has."""
        self._load.__exit__()
        while int(_field(str(self.client.ask("INFO", "clients")), "connected_clients")) > 1:
            pass
        self.client.__exit__(None)
        wanted = digest(self.server.port)
        dumped = json.loads(dumper.ask("dump"))
        # Reading the counter is no write: the last generation has what the one before had.
        newest = dumped["generation"]
        self.acknowledged[newest] = max(self.acknowledged.values())
        verified = ckpt("verify", self.image)
        if verified.returncode:
            self.outcome.errors.append(f"verify: {verified.stdout}{verified.stderr}")
        self.server.__exit__()
        with Restored(self.image) as back:
            if (found := digest(self.server.port)) != wanted:
                self.outcome.errors.append(f"restored {newest}: digest {found}, not {wanted}")
            self._check_counter(newest)
            assert back.said["generation"] == newest
        oldest = newest - KEEP + 1
        with Restored(self.image, "--at", str(oldest), "--tcp-close"):
            self._check_counter(oldest)

    def _check_counter(self, generation: int) -> None:
        with Redis(self.server.port) as client:
            found = client.ask("GET", COUNTER)
        wanted = str(self.acknowledged[generation])
        if found != wanted:
            self.outcome.errors.append(
                f"restored {generation}: {found} writes, {wanted} were acknowledged"
            )


def _field(info: str, name: str) -> str:
    return next(line for line in info.splitlines() if line.startswith(f"{name}:")).split(":")[1]


@contextlib.contextmanager
def _own_temporary_files(folder: Path) -> Iterator[None]:
    """Have all that is put aside be put where nobody else does."""
    folder.mkdir()
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = None
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before


def soak(
    folder: Path,
    n_dumps: int,
    *,
    most_s: float = float("inf"),
    tell: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    """Take `n_dumps`, or as many as fit into `most_s`, and see what came of it.

    Args:
        folder: empty; nothing is removed.
        n_dumps: how many, before the last one.
        most_s: no new one is begun after so many seconds.
        tell: called after each.
    """
    become_subreaper()
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_own_temporary_files(folder / "temporary"))
        server = stack.enter_context(Server(folder, N_KEYS))
        client = Redis(server.port)
        # It takes what processors have left over: the dumps are what is wanted.
        command = (
            f"exec nice -n 19 redis-benchmark -p {server.port} -c {N_CLIENTS} -n {N_REQUESTS}"
            # It tells how far it is all the time: who did not listen would stop it in the end.
            f" -t set -r {N_KEYS} -d 100 -q >/dev/null"
        )
        load = stack.enter_context(App(["sh", "-c", command], folder))
        soaked = Soak(folder, server, client, load)
        who = [sys.executable, DUMPER, str(server.pid)]
        dumper = stack.enter_context(App([*who, soaked.image, str(KEEP)], folder))
        outcome = soaked.outcome
        while outcome.n_dumps < n_dumps and time.monotonic() - began_s < most_s:
            soaked.dump(dumper, by_command=outcome.n_dumps % BY_COMMAND == BY_COMMAND - 1)
            outcome.seconds = time.monotonic() - began_s
            tell(outcome)
        soaked.finish(dumper)
    return outcome
