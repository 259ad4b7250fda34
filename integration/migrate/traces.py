"""Record how fast real programs write, for the tests of the policy (`tests/migrate/traces`).

    python -m integration.migrate.traces

The engine's own rounds do it, with a sink that takes as long as a link would: what is left after a
round of so many milliseconds is what a program writes in that time, each page once.
"""

import contextlib
import json
import mmap
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ckpt.engine.capture import examine
from ckpt.engine.convergence import Rest, Round, Verdict
from ckpt.engine.copying import Copy
from ckpt.engine.members import Members
from ckpt.engine.taking import Taking
from ckpt.image.pipeline import Release
from ckpt.kernel.features import probe_features
from ckpt.process.freezer import DEFAULT_TIMEOUT_S
from ckpt.resources.base import CaptureOptions
from ckpt.tracker.base import TrackerName
from ckpt.units import Pid
from integration.harness import CKPT
from integration.migrate.hosts import Hosts, Started, two_hosts
from integration.migrate.services import redis
from integration.workloads.build import build

TRACES = Path(__file__).parents[2] / "tests" / "migrate" / "traces"
WINDOWS_MS = (10, 20, 50, 100, 200, 500, 1000, 2000)
EACH = 4
"""So many rounds of each length."""


class SlowSink:
    """Takes a page stream, and `window_ms` for each round of it."""

    page_size = mmap.PAGESIZE

    def __init__(self) -> None:
        self.window_ms = 0.0
        self._due_s = 0.0
        self._n_pages = 0

    def begin(self, window_ms: float) -> None:
        self._due_s = time.monotonic() + window_ms / 1000

    def write_pages(self, pages: memoryview | bytes, release: Release | None = None) -> int:
        first, self._n_pages = self._n_pages, self._n_pages + len(pages) // self.page_size
        if release is not None:
            release()
        return first

    def drain(self) -> None:
        time.sleep(max(self._due_s - time.monotonic(), 0))


class Recording:
    """The policy: one round after the other, as long as they are wanted."""

    def __init__(self, sink: SlowSink) -> None:
        self._sink = sink
        self._windows_ms = iter([ms for ms in WINDOWS_MS for _ in range(EACH)])
        self.rounds: list[dict[str, float]] = []

    def decide(self, rests: Sequence[Rest], rounds: Sequence[Round], *, begin_ms: float) -> Verdict:
        assert begin_ms >= 0
        if len(rounds) > 1:
            rest, ms = rests[-1], round(rounds[-1].ms, 1)
            pages = rest.n_bytes // mmap.PAGESIZE
            self.rounds.append({"ms": ms, "pages": pages, "runs": rest.n_runs})
        window_ms = next(self._windows_ms, None) if rounds else 0.0
        if window_ms is None:
            return Verdict.GIVE_UP
        self._sink.begin(window_ms)
        return Verdict.COPY

    def fits(self, _rest: Rest) -> bool:
        return False

    @property
    def throttle(self) -> float:
        return 0.0


def record(pid: int) -> list[dict[str, float]]:
    """Return rounds of some lengths: `ms` that one took, `pages` and `runs` that it left."""
    features = probe_features()
    with contextlib.ExitStack() as stack:
        looked = examine(Pid(pid), features, CaptureOptions())
        members = Members(Pid(pid), TrackerName.WRITEPROTECT, features, stack)
        for each in looked.targets:
            members.add(each)
        sink = SlowSink()
        taking = Taking(
            looked=looked,
            members=members,
            copy=Copy(sink),
            parent=None,
            kill=False,
            max_freeze_ms=0.0,
            freeze_timeout_s=DEFAULT_TIMEOUT_S,
        )
        policy = Recording(sink)
        taking.rounds().run(policy)
    return policy.rounds


@contextlib.contextmanager
def a_writer(hosts: Hosts, directory: Path, rate: int) -> Iterator[Started]:
    """The program that writes in every way, at a rate."""
    with hosts.a.start([build("writer"), "--rate", str(rate)], cwd=directory) as work:
        assert work.line() == "ready"
        yield work
        assert work.ask("check") == "ok"


@contextlib.contextmanager
def a_redis(hosts: Hosts, directory: Path, mib: int, load: Sequence[str] = ()) -> Iterator[Started]:
    """A redis with some data, under redis-benchmark in the client's host, or idle."""
    with redis.start(hosts, directory, mib=mib) as server:
        if not load:
            yield server
            return
        where = ["-h", redis.SERVICE, "-p", str(redis.PORT), "-q", "-l"]
        with hosts.client.start(["redis-benchmark", *where, *load]) as clients:
            yield server
            assert clients.process.poll() is None, "the load has ended"


SETS = ("-t", "set", "-d", "960", "-r", "100000", "-c", "20")
PROGRAMS: dict[str, Callable[[Hosts, Path], contextlib.AbstractContextManager[Started]]] = {
    "writer-1000": lambda hosts, directory: a_writer(hosts, directory, 1000),
    "writer-10000": lambda hosts, directory: a_writer(hosts, directory, 10_000),
    "writer-100000": lambda hosts, directory: a_writer(hosts, directory, 100_000),
    "redis-idle": lambda hosts, directory: a_redis(hosts, directory, 128),
    "redis-sets": lambda hosts, directory: a_redis(hosts, directory, 128, SETS),
    "redis-counters": lambda hosts, directory: a_redis(
        hosts, directory, 128, ("-t", "incr", "-r", "1000", "-c", "20")
    ),
}


def main() -> None:
    """Record all programs."""
    TRACES.mkdir(exist_ok=True)
    for name, program in PROGRAMS.items():
        with (
            tempfile.TemporaryDirectory() as directory,
            two_hosts() as hosts,
            program(hosts, Path(directory)) as work,
        ):
            status = Path(f"/proc/{work.outer_pid}/status").read_text()
            resident_kib = int(status.split("VmRSS:")[1].split()[0])
            # ckpt looks at nothing that is in other namespaces than it.
            here = [CKPT[0], "-m", "integration.migrate.traces", str(work.pid)]
            rounds = json.loads(hosts.a.must(here))
        lines = ",\n  ".join(json.dumps(one) for one in rounds)
        head = f'"resident_pages": {resident_kib // 4}, "page_size": {mmap.PAGESIZE}'
        (TRACES / f"{name}.json").write_text(f'{{{head}, "rounds": [\n  {lines}\n]}}\n')
        print(name, rounds[-1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(record(int(sys.argv[1]))))
    else:
        main()
